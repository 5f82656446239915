"""Who may go on to the models: the languages in turn, and a flood only as far as it does not slow the others down.

A process of Python serves some hundred requests a second, and what it has taken up is answered in the order in which it
came. So a flood must wait before it is taken up. The first of a line goes on at once; more of it only while fewer are
inside than keep the models busy, and whose line has the fewest inside goes first.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator

from serve_app.batching import Overloaded


class Door:
    """Who is inside, and who waits. All methods belong to one event loop."""

    def __init__(self, busy: int, waiting: int, patience_s: float) -> None:
        """
        Args:
            busy: requests inside that keep the models busy: only the first of a line joins so many.
            waiting: requests that may stand in one line; one more is refused at once.
            patience_s: after which who waits is refused.
        """
        self._busy, self._waiting, self._patience_s = busy, waiting, patience_s
        self._inside: Counter[str] = Counter()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        """The first is the next whose turn it is."""

    @contextlib.asynccontextmanager
    async def passed(self, line: str) -> AsyncIterator[None]:
        """Waits for a place; it is given up at the end.

        Raises:
            Overloaded: the line is too long, or too slow.
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
        if len(self._lines.get(line, ())) >= self._waiting:
            raise Overloaded(1.0)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(line, deque()).append(turn)
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave(line)  # its turn came while its client went
            if isinstance(error, TimeoutError):
                raise Overloaded(1.0) from None
            raise
        finally:
            self._tidy()

    def _leave(self, line: str) -> None:
        self._inside[line] -= 1
        if not self._inside[line]:
            del self._inside[line]
        self._tidy()
        while fitting := [one for one in self._lines if self._fits(one)]:
            following = min(fitting, key=self._inside.__getitem__)  # of equals who has waited longest
            turns = self._lines.pop(following)
            turns.popleft().set_result(None)
            self._take(following)
            self._lines[following] = turns
            self._tidy()

    def _tidy(self) -> None:
        """Forgets who has gone, and lines in which nobody stands; the next one of each line is still there then."""
        for line, turns in list(self._lines.items()):
            while turns and turns[0].done():
                turns.popleft()
            if not turns:
                del self._lines[line]

    def _fits(self, line: str) -> bool:
        return not self._inside[line] or self._inside.total() < self._busy

    def _take(self, line: str) -> None:
        self._inside[line] += 1
