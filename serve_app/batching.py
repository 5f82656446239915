"""Requests of many clients in one forward pass: by tokens, and no language waits behind another's flood.

What arrives while a pass runs goes into the next one, so nothing waits for a timer. Each language has a queue of its
own, and a pass takes a text from each in turn until its budget of tokens is full: a language that asks a thousand times
as much as another has its own queue to wait in.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.errors import ApiError

In = TypeVar("In")
Out = TypeVar("Out")

IN_LINE, TRIED, LOADED, WRITTEN = 3 / 8, 1 / 8, 1 / 8, 1 / 4
"""Of a request's time, at most: in line, for a challenger's answer, for an adapter, for another language or wording.
Together less than all of it: who has waited for each is answered by champion, base and passage."""
_SMOOTHING = 0.2
"""Weight of the last pass in the running speed."""


class Overloaded(ApiError):
    """A queue is full."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(429, "overloaded", "too much waits; try again later", retry_after_s)

    def __reduce__(self) -> tuple[type[Overloaded], tuple[float | None]]:
        return Overloaded, (self.retry_after_s,)  # it crosses from a replica to the ingress


@dataclass
class _Waiting(Generic[In, Out]):
    item: In
    cost: int
    done: asyncio.Future[Out]


class Batcher(Generic[In, Out]):
    """Puts items together for `run`, which is called in one thread, one pass after the other.

    All methods belong to one event loop.
    """

    def __init__(
        self,
        run: Callable[[list[In]], Iterable[Out]],
        cost: Callable[[In], int],
        *,
        budget: int,
        capacity: int,
        patience_s: float = math.inf,
    ) -> None:
        """
        Args:
            run: one output for each input.
            cost: tokens of an input.
            budget: tokens of a pass; an input that is larger goes alone.
            capacity: tokens that may wait in each queue.
            patience_s: what would wait longer than this, as fast as the last passes were, is refused at once.
        """
        self._patience_s = patience_s
        self._run, self._cost, self._budget, self._capacity = run, cost, budget, capacity
        self._queues: dict[str, deque[_Waiting[In, Out]]] = {}
        self._tokens: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1)
        self._running: asyncio.Task[None] | None = None
        self._tokens_per_s = 0.0

    @property
    def waiting(self) -> dict[str, int]:
        """Queue -> tokens that wait in it."""
        return dict(self._tokens)

    async def submit(self, queue: str, items: Sequence[In]) -> list[Out]:
        """The outputs of some items, which may go through several passes.

        Raises:
            Overloaded: there is no room for them in their queue; nothing of them is run.
        """
        if not items:
            return []
        costs = [self._cost(item) for item in items]
        held = self._tokens.get(queue, 0)
        waits_s = self._ahead(queue, len(costs)) / self._tokens_per_s if self._tokens_per_s else 0.0
        if (held and held + sum(costs) > self._capacity) or waits_s > self._patience_s:
            raise Overloaded(max(waits_s, 1.0))
        loop = asyncio.get_running_loop()
        mine = [
            _Waiting[In, Out](item, cost, loop.create_future())
            for item, cost in zip(items, costs, strict=True)
        ]
        self._queues.setdefault(queue, deque()).extend(mine)
        self._tokens[queue] = held + sum(costs)
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._work())
        try:
            return list(await asyncio.gather(*(one.done for one in mine)))
        finally:
            for one in mine:
                one.done.cancel()  # of a client that has gone, what still waits is not run

    def _ahead(self, queue: str, items: int) -> int:
        """Tokens that are read before the last of new items of a queue: of each other queue one item in turn."""
        turns = len(self._queues.get(queue, ())) + items
        others = (own for name, own in self._queues.items() if name != queue)
        before = sum(one.cost for own in others for one in itertools.islice(own, turns))
        return before + self._tokens.get(queue, 0)

    async def _work(self) -> None:
        while batch := self._next():
            begin = time.perf_counter()
            try:
                found = await self._pass([one.item for one in batch])
            except Exception as error:
                await self._one_by_one(batch, error)
                continue
            speed = sum(one.cost for one in batch) / max(time.perf_counter() - begin, 1e-6)
            known = self._tokens_per_s or speed
            self._tokens_per_s = (1 - _SMOOTHING) * known + _SMOOTHING * speed
            for one, output in zip(batch, found, strict=True):
                if not one.done.done():
                    one.done.set_result(output)

    async def _pass(self, items: list[In]) -> list[Out]:
        def run() -> list[Out]:
            found = list(self._run(items))
            assert len(found) == len(items), f"{len(found)} outputs of {len(items)} inputs"
            return found

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def _one_by_one(self, batch: list[_Waiting[In, Out]], error: Exception) -> None:
        """After a pass that has failed: what cannot be run fails alone, and whose client has gone is left out."""
        for one in batch:
            if one.done.done():
                continue
            try:
                if len(batch) == 1:
                    raise error
                (output,) = await self._pass([one.item])
            except Exception as own:
                if not one.done.done():
                    one.done.set_exception(own)
            else:
                if not one.done.done():
                    one.done.set_result(output)

    def _next(self) -> list[_Waiting[In, Out]]:
        """The items of the next pass: one of each queue in turn while they fit."""
        batch: list[_Waiting[In, Out]] = []
        left = self._budget
        while self._queues:
            name, queue = next(iter(self._queues.items()))
            if batch and queue[0].cost > left:
                break
            one = queue.popleft()
            self._tokens[name] -= one.cost
            del self._queues[name]
            if queue:
                self._queues[name] = queue  # at the end of the line
            else:
                del self._tokens[name]
            if not one.done.done():
                batch.append(one)
                left -= one.cost
        return batch
