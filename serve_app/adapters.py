"""The adapters of an encoder that are in memory: loaded when asked for, the one least asked for forgotten afterwards.

However many ask for one that is not there, it is loaded once; the one that makes room goes after the new one has come,
and never while a request holds it; one that cannot be loaded costs nobody else theirs, and is not tried again for a
while: a storage that hangs would keep all requests of its market, and the loads of other markets behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection

from mlray.config import ConfigError, RunError

_AGAIN_S = 10.0
"""After which one that could not be loaded is tried again."""


class Unloadable(Exception):
    """An adapter that is not in memory, and cannot be now."""


class Adapters:
    """All methods belong to one event loop."""

    def __init__(
        self,
        load: Callable[[str], None],
        unload: Callable[[str], None],
        *,
        capacity: int,
        patience_s: float,
        pinned: Collection[str] = (),
        loaded: Collection[str] = (),
    ) -> None:
        """
        Args:
            load: puts an adapter into the model; runs in a thread, one at a time.
            unload: takes it out again; likewise.
            capacity: adapters that stay when nobody holds them.
            patience_s: for which a request waits for one; it may come for the next request.
            pinned: those that are never forgotten.
            loaded: those that are in the model already.
        """
        self._load, self._unload, self._capacity, self._pinned = load, unload, capacity, frozenset(pinned)
        self._patience_s = patience_s
        self._refused: dict[str, tuple[float, str]] = {}
        """Those that could not be loaded: when they may be tried again, and why."""
        self._loaded: OrderedDict[str, None] = OrderedDict.fromkeys(loaded)
        self._held: Counter[str] = Counter()
        self._coming: dict[str, tuple[asyncio.Task[None], float]] = {}
        """What loads each, and until when who asks waits for it."""
        self._one = asyncio.Lock()

    @property
    def loaded(self) -> list[str]:
        """Those in memory, the one longest not asked for first."""
        return list(self._loaded)

    @contextlib.asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[None]:
        """The adapter is in memory inside.

        Raises:
            Unloadable: it does not fit the model, cannot be read, or does not come in time.
        """
        self._held[name] += 1
        try:
            while name not in self._loaded:  # it may have gone again since it came
                await self._come(name)
            self._loaded.move_to_end(name)
            yield
        finally:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]

    async def _come(self, name: str) -> None:
        if name in self._refused and time.monotonic() < self._refused[name][0]:
            raise Unloadable(self._refused[name][1])
        if name not in self._coming:
            until = asyncio.get_running_loop().time() + self._patience_s
            self._coming[name] = asyncio.create_task(self._fetch(name)), until
        task, until = self._coming[name]
        try:
            async with asyncio.timeout_at(until):  # it comes no sooner for the last who asks
                await asyncio.shield(task)  # a client that goes takes nobody's adapter along
        except TimeoutError:
            raise Unloadable("it has not come in time") from None
        if name in self._refused:
            raise Unloadable(self._refused[name][1])

    async def _fetch(self, name: str) -> None:
        """Loads an adapter, or notes why that failed."""
        try:
            async with self._one:
                try:
                    await asyncio.to_thread(self._load, name)
                except Exception as error:
                    why = str(error) if isinstance(error, ConfigError | RunError) else type(error).__name__
                    self._refused[name] = time.monotonic() + _AGAIN_S, why
                    return
                self._refused.pop(name, None)
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
