"""Who may go on to the models: the languages in turn, and a flood only as far as it does not slow the others down.

A process of Python serves some hundred requests a second, and what it has taken up is answered in the order in which it
came. So a flood must wait before it is taken up. The first of a line goes on at once; more of it while few are inside,
or while another line asks for more than it has: several that are busy share passes, and one that is busy beside others
that are not waits. Whose line has the fewest inside goes first. A language that has asked alone for a second has more.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque

from mlray import languages
from mlray.config import Serving
from serve_app import metrics
from serve_app.batching import IN_LINE, Overloaded

_ALONE_S = 1.0
"""Without a request in another line after which a line is alone."""
_SHORT_CPU, _LONG_CPU, _GPU = (1, 32), (4, 32), (16, 64)
"""Requests that a replica works on at a time: of a line that asks for more than all others, and of one that asks alone
or all that ask alike. On a CPU a pass over short texts takes about as long as they would one by one, so a second one of
a flood would only stand in the others' way."""
_STANDING = 256
"""Requests of one line that wait until a replica takes them up."""


class Door:
    """Who is inside, and who waits. All methods belong to one event loop."""

    def __init__(self, shared: int, full: int, waiting: int, patience_s: float) -> None:
        """
        Args:
            shared: requests inside, which only the first of a line joins, or one that has fewer than another asks for.
            full: requests inside, which only the first of a line joins; also for a line while nobody of another one is
                here, or came a moment ago.
            waiting: requests that may stand in one line; one more is refused at once.
            patience_s: after which who waits is refused.
        """
        self._shared, self._full, self._waiting, self._patience_s = shared, full, waiting, patience_s
        self._last, self._before = ("", -math.inf), ("", -math.inf)
        """The last line that somebody came to, and the last other one, each with the time of that."""
        self._inside: Counter[str] = Counter()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        """The first is the next whose turn it is."""

    @classmethod
    def of(cls, settings: Serving, *, short: bool) -> Door:
        """Before all replicas, for requests that take a pass of a model, or many (not `short`)."""
        inside = _GPU if settings.gpus_per_replica else _SHORT_CPU if short else _LONG_CPU
        shared, full = (number * settings.num_replicas for number in inside)
        return cls(shared, full, _STANDING, settings.timeout_s * IN_LINE)

    async def enter(self, line: str) -> None:
        """Waits for a place, which `leave` gives up.

        Raises:
            Overloaded: the line is too long, or too slow.
        """
        if line != self._last[0]:
            self._before = self._last
        self._last = line, time.monotonic()
        if len(self._lines.get(line, ())) >= self._waiting:
            raise _refused(line)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(line, deque()).append(turn)
        self._admit()
        try:
            async with asyncio.timeout(self._patience_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.leave(line)  # its turn came while its client went
            if isinstance(error, TimeoutError):
                raise _refused(line) from None
            raise
        finally:
            self._tidy()

    def leave(self, line: str) -> None:
        """Gives a place to whoever is next."""
        self._inside[line] -= 1
        if not self._inside[line]:
            del self._inside[line]
        self._admit()

    def _admit(self) -> None:
        """Takes up whoever may go on."""
        self._tidy()
        while fitting := self._fitting():
            following = min(fitting, key=self._inside.__getitem__)  # of equals who has waited longest
            turns = self._lines.pop(following)
            turns.popleft().set_result(None)
            self._inside[following] += 1
            self._lines[following] = turns
            self._tidy()

    def _tidy(self) -> None:
        """Forgets who has gone, and lines in which nobody stands; the next one of each line is still there then."""
        for line, turns in list(self._lines.items()):
            while turns and turns[0].done():
                turns.popleft()
            if not turns:
                del self._lines[line]

    def _fitting(self) -> list[str]:
        """Lines whose next one may go on."""
        inside = self._inside.total()
        asks = self._inside + Counter({line: len(turns) for line, turns in self._lines.items()})
        del asks[languages.UNKNOWN]  # what somebody makes up raises nobody's share
        most = [*asks.most_common(2), ("", 0)]  # of all, and of the others of that line

        def fits(line: str) -> bool:
            if not self._inside[line] or inside < self._shared:
                return True
            other = most[line == most[0][0]][1]
            return inside < self._full and (self._inside[line] < other or self._is_alone(line))

        return [line for line in self._lines if fits(line)]

    def _is_alone(self, line: str) -> bool:
        _, other = self._before if line == self._last[0] else self._last
        return time.monotonic() > other + _ALONE_S and {line} >= self._lines.keys() | self._inside.keys()


def _refused(line: str) -> Overloaded:
    metrics.turned_away(line)
    return Overloaded(1.0)
