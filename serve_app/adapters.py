"""The adapters of an encoder that are in memory: loaded when asked for, the one least asked for forgotten afterwards.

However many ask for one that is not there, it is loaded once; the one that makes room goes after the new one has come,
and never while a request holds it; one that cannot be loaded costs nobody else theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection


class Adapters:
    """All methods belong to one event loop."""

    def __init__(
        self,
        load: Callable[[str], None],
        unload: Callable[[str], None],
        *,
        capacity: int,
        pinned: Collection[str] = (),
        loaded: Collection[str] = (),
    ) -> None:
        """
        Args:
            load: puts an adapter into the model; runs in a thread, one at a time.
            unload: takes it out again; likewise.
            capacity: adapters that stay when nobody holds them.
            pinned: those that are never forgotten.
            loaded: those that are in the model already.
        """
        self._load, self._unload, self._capacity, self._pinned = load, unload, capacity, frozenset(pinned)
        self._loaded: OrderedDict[str, None] = OrderedDict.fromkeys(loaded)
        self._held: Counter[str] = Counter()
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._one = asyncio.Lock()

    @property
    def loaded(self) -> list[str]:
        """Those in memory, the one longest not asked for first."""
        return list(self._loaded)

    @contextlib.asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[None]:
        """The adapter is in memory inside.

        Raises:
            ConfigError: it does not fit the model.
            RunError: it cannot be read.
        """
        self._held[name] += 1
        try:
            while name not in self._loaded:
                task = self._coming.get(name)
                if task is None:
                    task = self._coming[name] = asyncio.create_task(self._fetch(name))
                await asyncio.shield(task)  # a client that goes takes nobody's adapter along
            self._loaded.move_to_end(name)
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    async def _fetch(self, name: str) -> None:
        try:
            async with self._one:
                await asyncio.to_thread(self._load, name)
                self._loaded[name] = None
                while old := self._surplus(name):
                    del self._loaded[old]  # whoever asks from here on waits for it to come again
                    await asyncio.to_thread(self._unload, old)
        finally:
            del self._coming[name]

    def _surplus(self, new: str) -> str | None:
        """The one longest not asked for that can go, while there are more than the capacity."""
        if len(self._loaded) <= self._capacity:
            return None
        stay = self._pinned | self._held.keys() | {new}
        return next((one for one in self._loaded if one not in stay), None)
