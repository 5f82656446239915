"""Who may go on to the models: the languages in turn, and of one language only so many requests at a time.

A process of Python serves some hundred requests a second, and what it has taken up is answered in the order in which it
came. So a flood must wait before it is taken up: it holds its own places and no others, and a request in another
language finds one free.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator

from serve_app.batching import Overloaded


class Door:
    """Places behind a door, of which one line takes half at most. All methods belong to one event loop."""

    def __init__(self, places: int, waiting: int) -> None:
        """
        Args:
            places: requests inside at a time.
            waiting: requests that may stand in one line; one more is refused at once.
        """
        self._free, self._share, self._waiting = places, max(places // 2, 1), waiting
        self._inside: Counter[str] = Counter()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        """The first is the next whose turn it is."""

    @contextlib.asynccontextmanager
    async def passed(self, line: str) -> AsyncIterator[None]:
        """Waits for a place; it is given up at the end.

        Raises:
            Overloaded: the line is too long.
        """
        await self._enter(line)
        try:
            yield
        finally:
            self._leave(line)

    async def _enter(self, line: str) -> None:
        if line not in self._lines and self._fits(line):
            self._take(line)
            return
        ahead = self._lines.setdefault(line, deque())
        if len(ahead) >= self._waiting:
            raise Overloaded(1.0)
        turn = asyncio.get_running_loop().create_future()
        ahead.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(line)  # its turn came while its client went
            elif turn in ahead:
                ahead.remove(turn)
                if not ahead:
                    del self._lines[line]
            raise

    def _leave(self, line: str) -> None:
        self._free += 1
        self._inside[line] -= 1
        if not self._inside[line]:
            del self._inside[line]
        while fitting := [one for one in self._lines if self._fits(one)]:
            following = min(
                fitting, key=self._inside.__getitem__
            )  # of equals the one that has waited longest
            turns = self._lines.pop(following)
            turn = turns.popleft()
            if turns:
                self._lines[following] = turns
            if not turn.cancelled():
                turn.set_result(None)
                self._take(following)

    def _fits(self, line: str) -> bool:
        return self._free > 0 and self._inside[line] < self._share

    def _take(self, line: str) -> None:
        self._free -= 1
        self._inside[line] += 1
