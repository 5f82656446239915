"""Requests in one call: of what a short request costs in Ray, the call between two processes is the larger part."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from serve_app.errors import ApiError

In = TypeVar("In")
Out = TypeVar("Out")

_HELD_S = 0.05
"""After which a call that is not answered lets another one go."""
_GRACE_S = 0.1
"""For which the first answer of a call waits for the others, at least."""
_MOST_S = 1.0
"""And at most."""


class UnansweredError(Exception):
    """A call has ended without its answers."""


class Together(Generic[In, Out]):
    """Sends on what comes: at once while few calls are under way, else with the next one.

    All methods belong to one event loop.
    """

    def __init__(self, call: Callable[[list[In]], Awaitable[Sequence[Out | None]]], calls: int) -> None:
        """
        Args:
            call: gives an answer for each, as `answered_soon` does.
            calls: under way at a time, but for those that take long.
        """
        self._call, self._left = call, calls
        self._waiting: list[tuple[In, asyncio.Future[Out | None]]] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def ask(self, item: In) -> Out | None:
        """The answer; None: what went with it would have had to wait for it, so that it is to be asked for alone.

        Raises:
            UnansweredError: the call was ended.
            Exception: what `call` has raised.
        """
        answer: asyncio.Future[Out | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        self._send()
        return await answer

    def _send(self) -> None:
        if not self._left:
            return
        # Of a client that has gone, what has not been sent is not asked for.
        batch = [(item, answer) for item, answer in self._waiting if not answer.done()]
        self._waiting = []
        if not batch:
            return
        self._left -= 1
        # In no request's context: Serve takes a call for a part of the request in which it begins, and ends both.
        task = asyncio.create_task(self._answered(batch), context=contextvars.Context())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _answered(self, batch: list[tuple[In, asyncio.Future[Out | None]]]) -> None:
        holds = contextlib.ExitStack()
        holds.callback(self._let_another_go)  # once, whoever closes it first
        timer = asyncio.get_running_loop().call_later(_HELD_S, holds.close)
        fault: Exception = UnansweredError()
        try:
            found = await self._call([item for item, _ in batch])
            for (_, answer), one in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(one)
        except Exception as error:
            fault = error
        finally:
            timer.cancel()
            for answer in (one for _, one in batch if not one.done()):
                answer.set_exception(fault)
            holds.close()

    def _let_another_go(self) -> None:
        self._left += 1
        self._send()


async def answered_soon(asked: Sequence[Coroutine[Any, Any, Out]]) -> list[Out | None]:
    """The other side of a call: the answers; None for one that keeps the others waiting, which is given up."""
    tasks, begin = [asyncio.ensure_future(one) for one in asked], time.monotonic()
    left = set(tasks)
    try:
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            # A refusal is there before any work.
            if not all(isinstance(one.result(), ApiError) for one in done):
                break
        if left:
            # What falls into the next pass of the model takes twice as long as what was in this one.
            twice = 1.5 * (time.monotonic() - begin)
            await asyncio.wait(left, timeout=min(max(_GRACE_S, twice), _MOST_S))
        return [task.result() if task.done() else None for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
