"""Requests of many clients in one pass; a flood in one language waits in its own queue."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Sequence

import pytest

from serve_app.batching import Batcher, Overloaded
from serve_app.errors import ApiError


class Passes:
    """Doubles numbers, and keeps what came together; the first pass is held until `go`."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.go = threading.Event()

    def run(self, items: list[int]) -> list[int]:
        self.seen.append(items)
        assert self.go.wait(10)
        return [2 * item for item in items]


def batcher(
    run: Callable[[list[int]], Sequence[int]], budget: int = 8, capacity: int = 100
) -> Batcher[int, int]:
    return Batcher(run, abs, budget=budget, capacity=capacity)


async def begun(passes: Passes) -> None:
    while not passes.seen:
        await asyncio.sleep(0.001)


def test_what_comes_while_a_pass_runs_goes_into_the_next_one() -> None:
    passes = Passes()

    async def work() -> list[list[int]]:
        made = batcher(passes.run)
        first = asyncio.create_task(made.submit("en", [3]))
        await begun(passes)
        others = [asyncio.create_task(made.submit("en", [n])) for n in (1, 2, 4)]
        await asyncio.sleep(0)
        passes.go.set()
        return list(await asyncio.gather(first, *others))

    assert asyncio.run(work()) == [[6], [2], [4], [8]]
    assert passes.seen == [[3], [1, 2, 4]]


def test_the_budget_cuts_a_request_and_each_queue_has_its_turn() -> None:
    passes = Passes()

    async def work() -> list[list[int]]:
        made = batcher(passes.run)
        first = asyncio.create_task(made.submit("en", [1]))
        await begun(passes)
        flood = asyncio.create_task(made.submit("en", [2] * 10))
        other = asyncio.create_task(made.submit("ja", [3, 3]))
        large = asyncio.create_task(made.submit("ar", [50]))
        await asyncio.sleep(0)
        assert made.waiting == {"en": 20, "ja": 6, "ar": 50}
        passes.go.set()
        found = await asyncio.gather(first, flood, other, large)
        assert made.waiting == {}
        return list(found)

    assert asyncio.run(work()) == [[2], [4] * 10, [6, 6], [100]]
    # By hand, of eight tokens a pass: en, ja; then ar, which is more than a pass, alone; then en and ja in turn.
    assert passes.seen == [[1], [2, 3], [50], [2, 3, 2], [2] * 4, [2] * 3]


def test_a_full_queue_refuses_and_others_go_on() -> None:
    passes = Passes()

    async def work() -> None:
        made = batcher(passes.run, capacity=10)
        first = asyncio.create_task(made.submit("en", [1]))
        await begun(passes)
        waiting = asyncio.create_task(made.submit("en", [8]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await made.submit("en", [3])
        assert refused.value.retry_after_s > 0
        other = asyncio.create_task(made.submit("ja", [3]))
        await asyncio.sleep(0)
        passes.go.set()
        assert await asyncio.gather(first, waiting, other) == [[2], [16], [6]]

    asyncio.run(work())
    assert 3 in [item for one in passes.seen for item in one]


def test_what_would_wait_too_long_is_refused_at_once_and_a_pass_that_loses_some_fails() -> None:
    async def work() -> None:
        slow: Batcher[int, int] = Batcher(lambda items: items, abs, budget=8, capacity=1000, patience_s=2.0)
        slow._tokens_per_s = 10.0  # as the last passes were
        waiting = asyncio.create_task(slow.submit("en", [8, 8, 8]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await slow.submit("en", [1])
        assert refused.value.retry_after_s == pytest.approx(2.4)
        with pytest.raises(Overloaded) as refused:
            await slow.submit("ja", [1, 1, 1])  # en has three turns before the last of them
        assert refused.value.retry_after_s == pytest.approx(2.4)
        assert await slow.submit("ja", [1, 1]) == [1, 1]  # two turns of en: 1.6 s
        await waiting
        short: Batcher[int, int] = Batcher(lambda items: items[1:], abs, budget=8, capacity=1000)
        with pytest.raises(AssertionError, match="0 outputs of 1 inputs"):
            await short.submit("en", [1, 2])

    asyncio.run(work())


def test_a_client_that_has_gone_is_not_run_and_a_failure_is_its_own_alone() -> None:
    passes = Passes()

    def run(items: list[int]) -> list[int]:
        if -4 in items:
            raise ValueError("bad")
        return passes.run(items)

    async def work() -> None:
        made = batcher(run)
        first = asyncio.create_task(made.submit("en", [1]))
        await begun(passes)
        gone = asyncio.create_task(made.submit("en", [7]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        bad = [asyncio.create_task(made.submit("en", [n])) for n in (-4, 2)]
        passes.go.set()
        assert await first == [2]
        with pytest.raises(ValueError, match="bad"):
            await bad[0]
        assert await bad[1] == [4]
        assert await made.submit("en", [5]) == [10]

    asyncio.run(work())
    assert passes.seen == [[1], [2], [5]]


def test_who_goes_while_a_pass_fails_is_not_run_again() -> None:
    begin, go, seen = threading.Event(), threading.Event(), list[list[int]]()

    def run(items: list[int]) -> list[int]:
        seen.append(items)
        if len(items) == 2:
            begin.set()
            assert go.wait(10)
            raise ValueError("what one of them needs has gone")
        return items

    async def work() -> None:
        made = batcher(run)
        gone, stays = (asyncio.create_task(made.submit(name, [n])) for name, n in (("en", 1), ("de", 2)))
        await asyncio.to_thread(begin.wait, 10)
        gone.cancel()
        await asyncio.sleep(0)
        go.set()
        assert await stays == [2]

    asyncio.run(work())
    assert seen == [[1, 2], [2]]


def test_a_full_queue_crosses_from_a_replica_to_the_ingress() -> None:
    for error in (Overloaded(3.0), ApiError(404, "unknown_market", "there is none", None)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert vars(again) == vars(error)
