"""Requests that go in one call: none waits long for another's answer, and none is lost."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serve_app import together
from serve_app.errors import ApiError
from serve_app.together import Together, UnansweredError, answered_soon


class Other:
    """The other side, whose calls return when a test says so."""

    def __init__(self) -> None:
        self.asked = list[list[str]]()
        self._ends = list[asyncio.Event]()

    async def call(self, items: list[str]) -> list[str | None]:
        self.asked.append(items)
        self._ends.append(asyncio.Event())
        await self._ends[-1].wait()
        return [None if item == "x" else item.upper() for item in items]

    async def end(self, call: int) -> None:
        self._ends[call].set()
        await settled()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


Ask = Callable[[str], asyncio.Task[str | None]]


def played(story: Callable[[Other, Ask], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        other = Other()
        sent = Together[str, str](other.call, 2)
        await story(other, lambda item: asyncio.create_task(sent.ask(item)))

    asyncio.run(run())


def test_what_comes_while_calls_are_under_way_goes_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_HELD_S", 60.0)

    async def story(other: Other, ask: Ask) -> None:
        tasks = [ask(item) for item in "abcxe"]
        await settled()
        assert other.asked == [["a"], ["b"]]
        await other.end(0)
        assert other.asked[2:] == [["c", "x", "e"]]
        tasks.append(ask("f"))
        await settled()
        assert [task.done() for task in tasks] == [True, False, False, False, False, False]
        await other.end(2)
        assert other.asked[3:] == [["f"]]
        await other.end(1)
        await other.end(3)
        assert await asyncio.gather(*tasks) == ["A", "B", "C", None, "E", "F"]

    played(story)


def test_two_slow_calls_do_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_HELD_S", 0.0)

    async def story(other: Other, ask: Ask) -> None:
        slow = [ask("a"), ask("b")]
        await settled()
        quick = ask("c")
        await settled()
        await other.end(2)
        assert await quick == "C"
        assert not any(task.done() for task in slow)
        for call in (0, 1):
            await other.end(call)
        assert await asyncio.gather(*slow) == ["A", "B"]

    played(story)


def test_who_has_gone_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_HELD_S", 60.0)

    async def story(other: Other, ask: Ask) -> None:
        tasks = [ask(item) for item in "abcd"]
        await settled()
        tasks[2].cancel()
        tasks[1].cancel()  # under way
        await settled()
        await other.end(1)
        assert other.asked[2:] == [["d"]]
        for call in (0, 2):
            await other.end(call)
        assert (await tasks[0], await tasks[3]) == ("A", "D")

    played(story)


def test_a_call_that_fails_fails_those_that_went_with_it_and_no_others() -> None:
    lost = ConnectionError("the replica is gone")

    async def call(items: list[str]) -> list[str]:
        await asyncio.sleep(0.001)
        if "lost" in items:
            raise lost
        if "ended" in items:
            raise asyncio.CancelledError
        return items

    async def run() -> None:
        sent = Together[str, str](call, 1)
        for fault in ("lost", "ended"):
            asked = [sent.ask(item) for item in ("a", fault, "b")]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert found[0] == "a"
            assert {type(one) for one in found[1:]} == {
                ConnectionError if fault == "lost" else UnansweredError
            }
        assert await sent.ask("c") == "c"  # and another one may go

    asyncio.run(run())


def test_a_call_is_no_part_of_the_request_that_it_goes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Serve ends the calls of a request when its client goes, and knows them by the context."""
    monkeypatch.setattr(together, "_HELD_S", 0.0)
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")

    async def call(items: list[str]) -> list[str]:
        await asyncio.sleep(0.01)
        return [request.get()] * len(items)

    async def run() -> None:
        sent = Together[str, str](call, 1)

        async def ask(name: str) -> str | None:
            request.set(name)
            return await sent.ask(name)

        assert await asyncio.gather(*(ask(name) for name in "abc")) == ["none"] * 3

    asyncio.run(run())


def test_who_keeps_the_others_waiting_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_GRACE_S", 0.05)
    ended = list[str]()

    async def answer(name: str, seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            ended.append(name)
            raise
        return name

    async def refused(refusal: ApiError) -> Any:
        return refusal

    async def run() -> None:
        assert await answered_soon([answer("a", 60.0), answer("b", 0.0), answer("c", 0.01)]) == [
            None,
            "b",
            "c",
        ]
        await asyncio.sleep(0)
        assert ended == ["a"]
        # A refusal is there before any work: what has just begun is not slow.
        refusal = ApiError(404, "unknown_market", "no")
        assert await answered_soon([refused(refusal), answer("g", 0.15)]) == [refusal, "g"]
        # What falls into the next pass of the model is not slow either.
        assert await answered_soon([answer("h", 0.15), answer("i", 0.3)]) == ["h", "i"]
        assert await answered_soon([answer("d", 0.1)]) == ["d"]  # alone it has its time
        task = asyncio.create_task(answered_soon([answer("e", 60.0), answer("f", 60.0)]))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        assert ended == ["a", "e", "f"]

    asyncio.run(run())
