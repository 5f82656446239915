"""Adapters in memory: a hundred misses are one load, the new one comes before the old one goes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mlray.config import ConfigError
from serve_app import adapters as module
from serve_app.adapters import Adapters, Unloadable


class Model:
    """Keeps what was done to it, in order; loading what is called `bad` fails."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.tried: list[str] = []
        self.go = threading.Event()
        self.go.set()

    def load(self, name: str) -> None:
        assert self.go.wait(10)
        if name.startswith("bad"):
            raise ConfigError(f"{name} does not fit")
        if name == "torn" and "+torn" not in self.tried:
            self.tried.append("+torn")
            raise OSError("of a library, with a path")
        self.done.append(f"+{name}")

    def unload(self, name: str) -> None:
        self.done.append(f"-{name}")


def run(work: Callable[[Model, Adapters], Coroutine[Any, Any, None]], **settings: Any) -> list[str]:
    model = Model()

    async def inside() -> None:
        await work(
            model, Adapters(model.load, model.unload, **{"capacity": 2, "patience_s": 60.0, **settings})
        )

    asyncio.run(inside())
    return model.done


async def use(adapters: Adapters, name: str) -> None:
    async with adapters.held(name):
        await asyncio.sleep(0)


def test_a_hundred_misses_at_a_time_are_one_load() -> None:
    async def work(model: Model, adapters: Adapters) -> None:
        model.go.clear()
        asked = [asyncio.create_task(use(adapters, "de")) for _ in range(100)]
        await asyncio.sleep(0.05)
        asked[0].cancel()  # the one that began it goes
        model.go.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in found] == [asyncio.CancelledError, *[type(None)] * 99]

    assert run(work) == ["+de"]


def test_the_one_longest_not_asked_for_goes_after_the_new_one_has_come() -> None:
    async def work(_: Model, adapters: Adapters) -> None:
        for name in ("de", "fr", "de", "ja"):
            await use(adapters, name)
        assert adapters.loaded == ["de", "ja"]
        await use(adapters, "fr")

    assert run(work) == ["+de", "+fr", "+ja", "-fr", "+fr", "-de"]


def test_what_is_held_or_pinned_stays() -> None:
    async def work(_: Model, adapters: Adapters) -> None:
        async with adapters.held("de"):
            await use(adapters, "fr")
            await use(adapters, "ja")
            assert adapters.loaded == ["pin", "de", "ja"]
        await use(adapters, "es")
        assert adapters.loaded == ["pin", "es"]

    assert run(work, pinned=("pin",), loaded=("pin",)) == ["+de", "+fr", "+ja", "-fr", "+es", "-de", "-ja"]


def test_a_failed_load_is_told_to_all_who_ask_and_keeps_what_was_there() -> None:
    async def work(model: Model, adapters: Adapters) -> None:
        await use(adapters, "de")
        await use(adapters, "fr")
        model.go.clear()
        asked = [asyncio.create_task(use(adapters, "bad")) for _ in range(5)]
        await asyncio.sleep(0.05)
        model.go.set()
        for one in asked:
            with pytest.raises(Unloadable, match="bad does not fit"):
                await one
        assert adapters.loaded == ["de", "fr"]

    assert run(work) == ["+de", "+fr"]


def test_what_failed_is_tried_again_after_a_while_whatever_the_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(_: Model, adapters: Adapters) -> None:
        with pytest.raises(Unloadable, match=r"^OSError$"):
            await use(adapters, "torn")
        with pytest.raises(Unloadable, match=r"^OSError$"):
            await use(adapters, "torn")
        now = module.time.monotonic()
        monkeypatch.setattr(module.time, "monotonic", lambda: now + 11.0)
        await use(adapters, "torn")
        assert adapters.loaded == ["torn"]

    assert run(work) == ["+torn"]


def test_who_asks_does_not_wait_for_a_storage_that_hangs() -> None:
    async def work(model: Model, adapters: Adapters) -> None:
        model.go.clear()
        for name in ("de", "de", "fr"):
            with pytest.raises(Unloadable, match="not come in time"):
                await use(adapters, name)
        model.go.set()
        while adapters.loaded != ["de", "fr"]:  # for who asks later
            await asyncio.sleep(0.01)
        await use(adapters, "de")

    assert run(work, patience_s=0.02) == ["+de", "+fr"]
