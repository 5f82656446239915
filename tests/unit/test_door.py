"""The door before the models: a flood waits while they are busy, and nobody's turn is lost."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import yaml
from grpc.aio import Metadata
from ray import serve

from mlray import languages
from mlray.config import ConfigError, Serving
from serve_app import app, metrics, together
from serve_app.app import Behind
from serve_app.batching import Overloaded
from serve_app.door import Door
from serve_app.errors import ApiError
from serve_app.models import Asked
from serve_app.together import answered_soon


class Guests:
    """Requests that stay inside until they are told to go."""

    def __init__(self, door: Door) -> None:
        self.door, self.inside = door, list[str]()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def come(self, *names: str) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._stay(name))
        await settled()

    async def go(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await settled()

    async def _stay(self, name: str) -> None:
        await self.door.enter(name[:2])
        self.inside.append(name)
        try:
            await self._ends[name].wait()
        finally:
            self.inside.remove(name)
            self.door.leave(name[:2])


async def settled() -> None:
    for _ in range(100):
        await asyncio.sleep(0)


def played(
    story: Callable[[Guests], Awaitable[None]],
    shared: int = 2,
    full: int = 2,
    waiting: int = 100,
    patience_s: float = 60.0,
) -> None:
    async def run() -> None:
        guests = Guests(Door(shared, full, waiting, patience_s))
        await story(guests)
        for task in guests.tasks.values():
            task.cancel()
        await asyncio.gather(*guests.tasks.values(), return_exceptions=True)

    asyncio.run(run())


def test_a_flood_goes_on_only_while_the_models_have_less_to_do() -> None:
    async def story(guests: Guests) -> None:
        await guests.come(*(f"en{number}" for number in range(50)))
        assert guests.inside == ["en0", "en1"]
        await guests.come("de0", "fr0")
        assert guests.inside == ["en0", "en1", "de0", "fr0"]
        await guests.go("en0")
        await guests.go("de0")
        assert guests.inside == ["en1", "fr0"]  # two keep the models busy
        await guests.go("fr0")
        assert guests.inside == ["en1", "en2"]

    played(story)


def test_a_language_has_more_while_it_asks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serve_app.door.time.monotonic", lambda: now)

    async def story(guests: Guests) -> None:
        nonlocal now
        await guests.come("en0", "en1", "en2", "en3", "en4")
        assert guests.inside == ["en0", "en1", "en2", "en3"]
        await guests.come("de0")
        for name in ("en0", "en1", "de0"):
            await guests.go(name)
        assert guests.inside == ["en2", "en3"]
        now += 0.9
        await guests.come("en5")
        assert guests.inside == ["en2", "en3"]
        now += 0.2
        await guests.go("en2")  # nobody else has come for a second
        assert guests.inside == ["en3", "en4", "en5"]
        await guests.come("en6", "en7")
        assert guests.inside == ["en3", "en4", "en5", "en6"]

    played(story, full=4)


def test_a_language_is_not_alone_while_another_waits_or_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("serve_app.door.time.monotonic", lambda: now)

    async def story(guests: Guests) -> None:
        nonlocal now
        await guests.come("en0", "de0")
        now += 2.0
        await guests.come("en1", "en2", "en3")
        assert guests.inside == ["en0", "de0"]
        await guests.go("en0")
        assert guests.inside == ["de0", "en1"]
        await guests.go("de0")
        assert guests.inside == ["en1", "en2", "en3"]

    async def waiting(guests: Guests) -> None:
        nonlocal now
        await guests.come("en0", "de0", "de1")
        assert guests.inside == ["en0", "de0"]
        now += 2.0
        await guests.come("en1", "en2", "en3")
        assert guests.inside == ["en0", "de0", "en1", "de1"]  # as many as German, and not all
        await guests.go("de0")
        await guests.go("de1")
        assert guests.inside == ["en0", "en1", "en2", "en3"]

    played(story, full=8)
    played(waiting, full=8)


def test_languages_that_are_busy_share_the_places_beside_one_that_is_not() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("fr0", "en0", "en1", "en2", "en3", "en4")
        assert guests.inside == ["fr0", "en0"]  # English has as many as French asks for
        await guests.come("de0", "de1")
        assert guests.inside == ["fr0", "en0", "de0", "de1", "en1"]
        await guests.come("de2")  # so English may have three, and whose turn is longer ago goes first
        assert guests.inside == ["fr0", "en0", "de0", "de1", "en1", "en2"]
        await guests.go("fr0")
        assert guests.inside == ["en0", "de0", "de1", "en1", "en2", "de2"]  # six are all that go in
        await guests.go("de0")
        await guests.go("en0")
        assert guests.inside == ["de1", "en1", "en2", "de2"]  # German asks for two by now

    played(story, shared=1, full=6)


def test_made_up_languages_give_a_flood_no_places() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("fr0", "en0", "en1", "en2")
        waiting = [asyncio.create_task(guests.door.enter(languages.UNKNOWN)) for _ in range(5)]
        await settled()
        assert sum(one.done() for one in waiting) == 3  # as many as English asks for
        assert guests.inside == ["fr0", "en0"]  # which has no more for that
        for one in waiting:
            one.cancel()

    played(story, shared=1, full=6)


def test_languages_that_wait_take_turns() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "en1", "en2", "de0", "de1", "de2", "fr0")
        assert guests.inside == ["en0", "en1", "de0", "fr0"]
        for name in ("en0", "fr0"):
            await guests.go(name)
        assert guests.inside == ["en1", "de0"]
        await guests.go("en1")  # who has none comes first
        assert guests.inside == ["de0", "en2"]
        await guests.go("en2")
        assert guests.inside == ["de0", "de1"]  # nobody else waits

    played(story)


def test_too_long_a_line_is_refused_and_another_is_not() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "en1", "en2", "en3", "en4")
        with pytest.raises(Overloaded) as refused:
            await guests.tasks["en4"]
        assert (refused.value.status, refused.value.retry_after_s) == (429, 1.0)
        await guests.come("de0")
        assert "de0" in guests.inside

    played(story, waiting=2)


def test_who_goes_while_waiting_loses_nobody_a_place() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "en1", "en2", "en3")
        guests.tasks["en2"].cancel()
        await settled()
        await guests.go("en0")
        assert guests.inside == ["en1", "en3"]
        await guests.come("en4")
        guests.tasks["en1"].cancel()  # inside
        await settled()
        assert guests.inside == ["en3", "en4"]
        # Its turn comes and its client goes in the same moment.
        await guests.come("en5", "en6")
        guests._ends["en3"].set()
        guests.tasks["en3"].cancel()
        guests.tasks["en5"].cancel()
        await settled()
        assert guests.inside == ["en4", "en6"]
        for name in ("en4", "en6"):
            await guests.go(name)
        await guests.come("fr0", "fr1", "fr2", "de0", "es0")
        assert guests.inside == ["fr0", "fr1", "de0", "es0"]
        for name in ("fr0", "fr1", "de0", "es0"):
            await guests.go(name)
        assert guests.inside == ["fr2"]
        assert not guests.door._lines

    played(story)


def test_two_floods_share_and_a_third_language_goes_before_both() -> None:
    async def story(guests: Guests) -> None:
        await guests.come(*(f"{line}{number}" for number in range(9) for line in ("en", "de")))
        assert guests.inside == ["en0", "de0", "en1", "de1"]
        await guests.come("fr0")
        assert guests.inside[-1] == "fr0"
        for name in ("de0", "en0"):
            await guests.go(name)
        assert guests.inside == ["en1", "de1", "fr0", "en2"]

    played(story, shared=4, full=4)


def test_who_goes_at_the_head_of_a_line_does_not_cost_it_its_turn() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "de0", "en1", "en2", "de1")
        guests._ends["en0"].set()
        guests.tasks["en1"].cancel()
        await settled()
        assert guests.inside == ["de0", "en2"]

    played(story)


def test_who_has_waited_too_long_is_refused() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "en1", "en2")
        with pytest.raises(Overloaded):
            await guests.tasks["en2"]
        assert guests.inside == ["en0", "en1"]
        assert not guests.door._lines

    played(story, patience_s=0.01)


class Replicas:
    """A handle whose answers come when they are told to."""

    def __init__(self) -> None:
        self.asked = list[str]()
        self.calls = list[list[tuple[Any, ...]]]()
        self.go_on = asyncio.Event()
        self.ask = SimpleNamespace(remote=self._answer)
        champion = {
            "languages": ["de", "en", "pt-BR"],
            "recommends": ["mx", "shop-uk", "shop-ca"],
            "markets": {"fr": 9},
        }
        self.told: Any = {"champion": champion}
        self.readies = self.empty = 0
        self.fault: Exception | None = None
        self.slow = asyncio.Event()
        self.slow.set()

    def options(self, *, method_name: str, _by_reference: bool) -> SimpleNamespace:
        assert (method_name, _by_reference) == ("ask_all", False)
        return SimpleNamespace(remote=self._answers)

    async def _answers(self, asked: list[tuple[Any, ...]]) -> list[Any]:
        self.calls.append(asked)
        if self.fault:
            raise self.fault
        return await answered_soon([self._answer(*one) for one in asked])

    async def _answer(self, what: str, *told: Any) -> Any:
        if what == "ready":
            self.readies += 1
            await self.slow.wait()
            return "b-1"
        if what == "about":
            return self.told
        self.asked.append(f"{what} {told[1] if what == 'search' else told[0]}")
        await self.go_on.wait()
        self.empty -= 1
        return ApiError(503, "no_champion", "no model is served yet") if self.empty >= 0 else {}


@pytest.mark.parametrize(
    ("serving", "short", "inside"),
    [
        ({}, True, 2),  # the first of each line
        ({"num_replicas": 3}, True, 3),
        ({}, False, 4),
        ({"num_replicas": 2, "gpus_per_replica": 1}, True, 32),
    ],
)
def test_how_many_are_inside_while_two_languages_ask(
    serving: dict[str, Any], short: bool, inside: int
) -> None:
    async def run() -> None:
        guests = Guests(Door.of(Serving.model_validate(serving), short=short))
        await guests.come("de0", "fr0", *(f"de{number}" for number in range(1, 60)))
        assert len(guests.inside) == inside
        await guests.go("de0")
        assert (len(guests.inside), "de1" in guests.inside) == (inside, True)
        for one in guests.tasks.values():
            one.cancel()

    asyncio.run(run())


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call waits for the answer of another."""
    monkeypatch.setattr(together, "_HELD_S", 0.0)


@pytest.mark.usefixtures("at_once")
def test_made_up_languages_and_markets_have_one_line_together() -> None:
    async def run() -> None:
        replicas = Replicas()
        behind = Behind(replicas, Serving(num_replicas=1))  # type: ignore[arg-type]
        made_up = [behind.recommend(f"q{number}", [], 3) for number in range(20)]
        made_up += [behind.recommend(f"aa-x-{number}", [], 3) for number in range(20)]
        tasks = [asyncio.create_task(one) for one in made_up]
        await settled()
        assert len(replicas.asked) == 32
        tasks += [asyncio.create_task(behind.recommend(tag, [], 3)) for tag in ("mx", "de-AT", "de-CH", "fr")]
        await settled()
        assert replicas.asked[32:] == ["recommend mx", "recommend de-AT", "recommend fr"]
        replicas.go_on.set()
        await asyncio.gather(*tasks)
        assert len(replicas.asked) == 44
        assert replicas.asked.index("recommend de-CH") < 40  # before the most of the flood

    asyncio.run(run())


@pytest.mark.usefixtures("at_once")
def test_shops_whose_names_begin_alike_have_lines_of_their_own() -> None:
    async def run() -> None:
        replicas = Replicas()
        behind = Behind(replicas, Serving())  # type: ignore[arg-type]
        behind._lines()  # asks for the champion's markets
        await settled()
        flood = [asyncio.create_task(behind.recommend("shop-uk", [], 3)) for _ in range(40)]
        await settled()
        other = asyncio.create_task(behind.recommend("shop-ca", [], 3))
        await settled()
        assert replicas.asked == ["recommend shop-uk"] * 32 + ["recommend shop-ca"]
        replicas.go_on.set()
        await asyncio.gather(*flood, other)

    asyncio.run(run())


def test_a_request_is_answered_where_nobody_tells_of_the_champion() -> None:
    async def run() -> None:
        replicas = Replicas()
        replicas.told = ApiError(503, "unavailable", "not now")
        replicas.go_on.set()
        assert await Behind(replicas, Serving()).recommend("de", [], 3) == {}  # type: ignore[arg-type]
        assert replicas.asked == ["recommend de"]

    asyncio.run(run())


@pytest.mark.usefixtures("at_once")
def test_a_search_stands_in_the_line_of_its_language_whatever_the_market() -> None:
    """English customers flood the German shop and the French one: a German customer goes before them."""

    async def run() -> None:
        replicas = Replicas()
        behind = Behind(replicas, Serving())  # type: ignore[arg-type]
        flood = [behind.search("a", ("de", "fr")[n % 2], 3, Asked("en")) for n in range(40)]
        tasks = [asyncio.create_task(one) for one in flood]
        await settled()
        assert len(replicas.asked) == 32
        tasks += [asyncio.create_task(behind.search("a", "fr", 3, Asked("de")))]
        await settled()
        assert replicas.asked[32:] == ["search fr"]
        replicas.go_on.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_however_many_ask_whether_it_is_ready_a_replica_is_asked_once() -> None:
    async def run() -> None:
        replicas = Replicas()
        behind = Behind(replicas, Serving())  # type: ignore[arg-type]
        assert await asyncio.gather(*(behind.ready() for _ in range(50))) == ["b-1"] * 50
        assert replicas.readies == 1
        behind._asked -= 2.0
        await behind.ready()
        assert replicas.readies == 2

    asyncio.run(run())


@pytest.mark.usefixtures("at_once")
def test_a_client_that_goes_keeps_the_place_of_what_still_runs() -> None:
    async def run() -> None:
        replicas = Replicas()
        behind = Behind(replicas, Serving())  # type: ignore[arg-type]
        behind._lines()  # asks for the champion's languages
        await settled()
        flood = [asyncio.create_task(behind.search("a", "de", 3, Asked("en"))) for _ in range(40)]
        await settled()
        for task in flood:
            task.cancel()
        await settled()
        assert all(task.cancelled() for task in flood)
        flood = [asyncio.create_task(behind.search("a", "de", 3, Asked("en"))) for _ in range(5)]
        await settled()
        assert len(replicas.asked) == 32
        replicas.go_on.set()
        await asyncio.gather(*flood)
        assert len(replicas.asked) == 37

    asyncio.run(run())


def test_short_requests_go_in_one_call_and_many_texts_alone() -> None:
    async def run() -> None:
        replicas = Replicas()
        behind = Behind(replicas, Serving())  # type: ignore[arg-type]
        asked = [["a"], ["b"], ["c"], ["d"] * 8, ["e"] * 9]
        tasks = [asyncio.create_task(behind.embed(texts, Asked("en"), None, None)) for texts in asked]
        await settled()
        replicas.go_on.set()
        await asyncio.gather(*tasks)
        assert sorted(map(len, replicas.calls)) == [1, 1, 2]
        assert len(replicas.asked) == 5

    asyncio.run(run())


def test_whoever_asks_first_whether_it_is_ready_may_go() -> None:
    async def run() -> None:
        replicas = Replicas()
        replicas.slow = asyncio.Event()
        behind = Behind(replicas, Serving())  # type: ignore[arg-type]
        first, second = (asyncio.create_task(behind.ready()) for _ in range(2))
        await settled()
        first.cancel()
        await settled()
        replicas.slow.set()
        assert await second == "b-1"
        assert (replicas.readies, first.cancelled()) == (1, True)

    asyncio.run(run())


def test_another_replica_is_asked_where_the_first_serves_nothing() -> None:
    async def run() -> None:
        replicas = Replicas()
        replicas.empty = 1
        replicas.go_on.set()
        assert await Behind(replicas, Serving()).recommend("de", [], 3) == {}  # type: ignore[arg-type]
        assert replicas.asked == ["recommend de", "recommend de"]
        replicas.empty = 2
        with pytest.raises(ApiError, match="no model is served yet"):
            await Behind(replicas, Serving()).recommend("de", [], 3)  # type: ignore[arg-type]

    asyncio.run(run())


def test_what_a_shared_call_cannot_carry_is_asked_alone() -> None:
    async def run() -> None:
        replicas = Replicas()
        replicas.go_on.set()
        replicas.fault = grpc.aio.AioRpcError(
            grpc.StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata(), "long"
        )
        behind = Behind(replicas, Serving())  # type: ignore[arg-type]
        assert await asyncio.gather(*(behind.recommend(tag, [], 3) for tag in ("de", "fr"))) == [{}, {}]
        assert len(replicas.calls) == 2  # each alone: nothing was under way when it came
        assert sorted(replicas.asked) == ["recommend de", "recommend fr"]

    asyncio.run(run())


@pytest.mark.usefixtures("at_once")
def test_translations_hold_no_place_of_a_search() -> None:
    async def run() -> None:
        replicas = Replicas()
        behind = Behind(replicas, Serving())  # type: ignore[arg-type]
        told = ("en", dict[str, str](), list[str](), Asked("de", "en"))
        slow = [asyncio.create_task(behind.translate([f"t{n}"], *told)) for n in range(50)]
        await settled()
        assert len(replicas.asked) == 32
        slow += [asyncio.create_task(behind.search("kettle", "de", 3, Asked()))]
        slow += [asyncio.create_task(behind.embed(["kettle"], Asked(None, "de-DE"), None, None))]
        slow += [asyncio.create_task(behind.support(["Wo bleibt meine Bestellung?"], 3, Asked()))]
        await settled()
        assert sorted(replicas.asked[32:]) == [
            "embed ['kettle']",
            "search de",
            "support ['Wo bleibt meine Bestellung?']",
        ]
        replicas.go_on.set()
        await asyncio.gather(*slow)

    asyncio.run(run())


def test_the_configuration_of_a_cluster_is_one_of_this_application() -> None:
    """`serve deploy` calls `import_path` with `args`."""
    told = yaml.safe_load(Path("serve_app/config.yaml").read_text(encoding="utf-8"))["applications"][0]
    module, _, name = told["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is app.build
    assert isinstance(app.build(told["args"]), serve.Application)
    with pytest.raises(ConfigError, match=r"unknown key 'release\.registry'; did you mean"):
        app.build({"release.registry": "s3://bucket/registry"})


@pytest.mark.parametrize(
    ("text", "asked", "line"),
    [
        ("x", Asked("pt-PT"), "pt"),
        ("x", Asked(None, "fr-CA,fr;q=0.9"), "fr"),
        ("Wo bleibt meine Bestellung, die ich letzte Woche aufgegeben habe?", Asked(), "de"),
        ("1234", Asked(), "und"),
        ("x", Asked("nonsense"), "und"),
    ],
)
def test_the_line_of_a_text(text: str, asked: Asked, line: str) -> None:
    assert app._tag(text, asked).partition("-")[0] == line


def test_who_is_turned_away_is_counted_by_line() -> None:
    def count() -> float:
        return sum(
            sample.value
            for family in metrics._TURNED_AWAY.collect()
            for sample in family.samples
            if sample.name.endswith("_total") and sample.labels["line"] == "de"
        )

    async def run() -> None:
        door = Door(1, 1, 1, 0.01)
        await door.enter("de")
        waiting = asyncio.create_task(door.enter("de"))
        await settled()
        with pytest.raises(Overloaded):  # the line is full
            await door.enter("de")
        with pytest.raises(Overloaded):  # and too slow
            await waiting

    before = count()
    asyncio.run(run())
    assert count() == before + 2


def test_what_an_operator_must_see_is_a_gauge() -> None:
    async def run() -> None:
        replicas = Replicas()
        replicas.told = {
            "champion": None,
            "challenger": {"trial": {"stopped": {"search de": "why"}}},
            "fault": "x",
        }
        await Behind(replicas, Serving()).about()  # type: ignore[arg-type]
        assert (metrics._STOPPED._value.get(), metrics._FAULT._value.get()) == (1.0, 1.0)
        replicas.told = {"champion": None, "challenger": None, "fault": ""}
        await Behind(replicas, Serving()).about()  # type: ignore[arg-type]
        assert (metrics._STOPPED._value.get(), metrics._FAULT._value.get()) == (0.0, 0.0)

    asyncio.run(run())
