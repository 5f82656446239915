"""The challenger beside the champion: sticky shares, a market that goes back by itself, searches that are unseen."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mlray.config import RunConfig, Serving
from mlray.release import bundle
from mlray.release.index import ProductIndex
from mlray.release.registry import Event, Registry
from serve_app.errors import ApiError
from serve_app.models import Asked, Models
from serve_app.trials import Trial, agreement
from tests.unit.test_mixed import adapter
from tests.unit.test_models import TITLES, kept, promoted

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
)


def challenged(root: Path, *, bad: str | None, index: bool = True) -> Registry:
    """A champion, and a challenger that reads alike but for the market `bad`, whose adapter nobody has trained."""
    registry = promoted(root, "one", 0, prefix="a")
    champion = registry.history().champion
    assert champion is not None
    stage = root / "stage-two"
    (root / "stage-one").rename(stage)
    if bad:
        adapter(stage / "weights", stage / "adapters" / bad, 7)
    about = {"objective": "contrastive", "adapters": [bad] if bad else [], "seed": 1}
    made = registry.put("bundles", stage, "two", about)
    if index:
        read = bundle.open_reader(registry, champion.bundle)
        built = ProductIndex(16)
        for market, titles in TITLES.items():
            built.upsert(
                market, [f"a{i}" for i in range(len(titles))], read(titles, [market] * len(titles)), titles
            )
        kept(registry, built, root / "index-two", made)
    registry.append(registry.history(), action="challenge", bundle=made, index=None, why="")
    return registry


def opened(root: Path, **serving: Any) -> Models:
    values = {"release": {"registry_uri": str(root / "registry")}, "serving": {"watch_s": 1000.0, **serving}}
    return Models(RunConfig.model_validate(values))


def search(models: Models, market: str, customers: list[str | None], query: str | None = None) -> list[str]:
    """The bundle that answers each customer."""

    async def work() -> list[str]:
        found = []
        for place, customer in enumerate(customers):
            text = query or TITLES[market][place % 12]
            told = await models.search(text, market, 3, Asked(market, None, customer))
            found.append(told["served_by"]["bundle"].split("-")[0])
            await asyncio.sleep(0.02)  # what is compared behind the answer is done
        await asyncio.sleep(0.3)
        return found

    return asyncio.run(work())


def test_a_share_of_the_customers_stays_with_the_challenger(tmp_path: Path) -> None:
    challenged(tmp_path, bad=None)
    models = opened(tmp_path, canary=0.5)
    customers: list[str | None] = [f"c{number}" for number in range(40)]
    first = search(models, "de", customers)
    assert 8 <= first.count("two") <= 32
    assert search(models, "en", customers) == first  # sticky, whatever is asked
    assert search(models, "de", [None] * 5) == ["one"] * 5
    told = asyncio.run(models.about())["challenger"]["trial"]
    assert told["agreement"] == {"de": 1.0, "en": 1.0}
    assert told["stopped"] == {}
    everybody = opened(tmp_path, canary=1.0)
    assert set(search(everybody, "de", customers[:3])) == {"two"}


def test_a_bad_adapter_takes_its_market_back_and_no_other(tmp_path: Path) -> None:
    challenged(tmp_path, bad="de")
    models = opened(tmp_path, canary=1.0, agreement=0.9)
    customers: list[str | None] = ["c"] * 24
    assert search(models, "en", customers) == ["two"] * 24
    german = search(models, "de", customers)
    assert german[:20] == ["two"] * 20
    assert german[-1] == "one"
    assert set(search(models, "en", customers)) == {"two"}
    told = asyncio.run(models.about())["challenger"]["trial"]
    assert told["stopped"].keys() == {"de"}
    assert "serving.agreement=0.9" in told["stopped"]["de"]
    assert told["agreement"]["en"] == 1.0


def test_shadow_is_unseen_and_counted(tmp_path: Path) -> None:
    challenged(tmp_path, bad="de")
    models = opened(tmp_path, shadow=1.0, agreement=0.9)
    assert set(search(models, "de", [None] * 22)) == {"one"}
    assert set(search(models, "en", ["c"] * 3)) == {"one"}
    told = asyncio.run(models.about())["challenger"]["trial"]
    assert told["agreement"]["de"] < 0.9
    assert told["agreement"]["en"] == 1.0
    assert told["stopped"].keys() == {"de"}


def test_a_challenger_without_an_index_is_told_and_the_champion_serves(tmp_path: Path) -> None:
    challenged(tmp_path, bad=None, index=False)
    models = opened(tmp_path, canary=1.0)
    assert search(models, "de", ["c"]) == ["one"]
    about = asyncio.run(models.about())
    assert "has 0 indexes" in models.watch.said
    assert about["fault"] == "the challenger cannot be taken up; the log of the server says why"
    assert "trial" not in about["challenger"]


def test_a_promoted_challenger_is_no_trial_any_more(tmp_path: Path) -> None:
    registry = challenged(tmp_path, bad=None)
    models = opened(tmp_path, canary=1.0)
    challenger = registry.history().challenger
    assert challenger is not None
    index = next(one for one in registry.names("indexes") if one.startswith("index-two"))
    registry.append(registry.history(), action="promote", bundle=challenger.bundle, index=index, why="")
    models.watch.look()
    assert search(models, "de", ["c", None]) == ["two", "two"]
    assert models.watch.trials.about() == {}


def test_whoever_is_challenger_no_more_answers_nobody(tmp_path: Path) -> None:
    registry = challenged(tmp_path, bad=None)
    models = opened(tmp_path, canary=1.0)
    assert search(models, "de", ["c"]) == ["two"]
    other = registry.put("bundles", tmp_path / "stage-two", "three", {"objective": "contrastive"})
    registry.append(registry.history(), action="challenge", bundle=other, index=None, why="")
    models.watch.look()
    assert search(models, "de", ["c"]) == ["one"]
    about = asyncio.run(models.about())
    assert about["challenger"]["id"] == other
    assert "trial" not in about["challenger"]
    assert "has 0 indexes" in models.watch.said


def test_the_faults_of_champion_and_challenger_are_both_told(tmp_path: Path) -> None:
    registry = challenged(tmp_path, bad=None, index=False)
    models = opened(tmp_path, canary=1.0)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x").write_text("x")
    broken = registry.put("bundles", tmp_path / "bad", "bad", {"objective": "masked"})
    registry.append(registry.history(), action="promote", bundle=broken, index=None, why="")
    for _ in range(2):
        models.watch.look()
        assert "makes no vectors" in models.watch.said
        assert "has 0 indexes" in models.watch.said
    assert search(models, "de", [None]) == ["one"]


class Slow:
    """Stands for a bundle in `Ask`; fails where it is told to."""

    def __init__(self, name: str, fault: Exception | None = None) -> None:
        self.name, self.fault = name, fault
        event = Event(1, "challenge", name, None, "x", "now", "")
        self.champion = type("Of", (), {"event": event})()


def answers(trial: Trial, times: int, faults: dict[str, Exception]) -> list[str]:
    async def ask(reading: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        if reading.name in faults:
            raise faults[reading.name]
        return {"results": [{"id": "a"}], "by": reading.name}

    async def work() -> list[str]:
        now: Any = Slow("champion")
        found = []
        for _ in range(times):
            found.append((await trial.answer(now, ask, "de", "c"))["by"])
            await asyncio.sleep(0)
        return found

    return asyncio.run(work())


def test_a_challenger_that_fails_costs_no_answer() -> None:
    trial = Trial(Slow("challenger"), Serving(canary=1.0))  # type: ignore[arg-type]
    assert answers(trial, 25, {"challenger": RuntimeError("broken")}) == ["champion"] * 25
    assert trial.about()["stopped"]["de"].startswith("of the last 20 searches 20 failed, and 0%")


def test_a_challenger_that_is_too_slow_costs_half_of_the_time() -> None:
    trial = Trial(Slow("challenger"), Serving(canary=1.0, timeout_s=0.04))  # type: ignore[arg-type]

    async def ask(reading: Any) -> dict[str, Any]:
        await asyncio.sleep(10.0 if reading.name == "challenger" else 0.0)
        return {"results": [], "by": reading.name}

    now: Any = Slow("champion")

    async def work() -> list[str]:
        return [(await trial.answer(now, ask, "de", "c"))["by"] for _ in range(21)]

    assert asyncio.run(work()) == ["champion"] * 21
    assert trial.about()["stopped"]["de"].startswith("of the last 20 searches 20 failed")


def test_a_full_queue_says_nothing_of_the_bundle() -> None:
    trial = Trial(Slow("challenger"), Serving(canary=1.0))  # type: ignore[arg-type]
    full = ApiError(429, "overloaded", "too much waits", 1.0)
    assert answers(trial, 25, {"challenger": full}) == ["champion"] * 25
    assert trial.about()["agreement"] == {}


def test_agreement_is_the_share_in_common() -> None:
    def told(*names: str) -> dict[str, Any]:
        return {"results": [{"id": name} for name in names]}

    assert agreement(told("a", "b", "c", "d"), told("d", "x", "a", "y")) == 0.5
    assert agreement(told("a"), told("a", "b", "c", "d")) == 0.25
    assert agreement(told(), told()) == 1.0
    assert agreement(told("a"), told()) == 0.0
