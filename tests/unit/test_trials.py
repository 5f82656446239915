"""The challenger beside the champion: sticky shares, a market that goes back by itself, searches that are unseen."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mlray import storage
from mlray.access import StorageError
from mlray.config import RunConfig, Serving
from mlray.release import bundle, promotion
from mlray.release.index import ProductIndex
from mlray.release.registry import Event, Registry
from serve_app.errors import ApiError
from serve_app.models import Asked, Models
from serve_app.reading import Reading
from serve_app.support import Source
from serve_app.trials import Trial, agreement
from tests.unit.test_mixed import adapter
from tests.unit.test_models import ANSWERS, TITLES, kept, promoted

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
)


def challenged(root: Path, *, bad: str | None, index: bool = True, exchanged: str | None = None) -> Registry:
    """A champion, and a challenger that reads alike but for the market `bad`, whose adapter nobody has trained.

    In its index the products of the market `exchanged` have each other's vectors.
    """
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
            names = [f"a{i}" for i in range(len(titles))]
            vectors_NH = read(titles, [market] * len(titles))
            built.upsert(market, names, vectors_NH[::-1] if market == exchanged else vectors_NH, titles)
        kept(registry, built, root / "index-two", made)
    registry.append(registry.history(), action="challenge", bundle=made, index=None, why="")
    return registry


def knowing(registry: Registry, root: Path, answers: dict[str, dict[str, str]]) -> None:
    """An index of answers for the challenger: language -> intent -> text."""
    challenger = registry.history().challenger
    assert challenger is not None
    read, built = bundle.open_embedder(registry, challenger.bundle), ProductIndex(16)
    for language, texts in answers.items():
        built.upsert(language, list(texts), read.embed(list(texts.values())), list(texts.values()))
    folder = root / "answers-two"
    folder.mkdir()
    built.save(folder)
    registry.put("indexes", folder, "answers-two", {"bundle": challenger.bundle, "kind": "knowledge"})


def opened(root: Path, **serving: Any) -> Models:
    values = {"release": {"registry_uri": str(root / "registry")}, "serving": {"watch_s": 1000.0, **serving}}
    return Models(RunConfig.model_validate(values))


async def compared(models: Models) -> None:
    """What is compared behind the answers is done."""
    trial = models.watch.trials._trial
    while trial and trial._behind:
        await asyncio.sleep(0.001)


def search(models: Models, market: str, customers: list[str | None], query: str | None = None) -> list[str]:
    """The bundle that answers each customer."""

    async def work() -> list[str]:
        found = []
        for place, customer in enumerate(customers):
            text = query or TITLES[market][place % 12]
            told = await models.search(text, market, 3, Asked(market, None, customer))
            found.append(told["served_by"]["bundle"].split("-")[0])
            await compared(models)
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
    assert told["agreement"] == {"search de": 1.0, "search en": 1.0}
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
    assert told["stopped"].keys() == {"search de"}
    assert "serving.agreement=0.9" in told["stopped"]["search de"]
    assert told["agreement"]["search en"] == 1.0


def test_all_replicas_know_where_a_trial_was_stopped(tmp_path: Path) -> None:
    challenged(tmp_path, bad="de")
    one, other = (opened(tmp_path, canary=1.0, agreement=0.9) for _ in range(2))
    assert search(one, "de", ["c"] * 24)[-1] == "one"
    assert search(other, "de", ["c"]) == ["two"]
    one.watch.look()
    other.watch.look()
    assert search(other, "de", ["c"]) == ["one"]
    assert search(other, "en", ["c"]) == ["two"]
    later = opened(tmp_path, canary=1.0, agreement=0.9)
    assert search(later, "de", ["c"]) == ["one"]
    reasons = [
        asyncio.run(models.about())["challenger"]["trial"]["stopped"] for models in (one, other, later)
    ]
    assert reasons == [reasons[0]] * 3
    assert reasons[0].keys() == {"search de"}
    kept_there = (tmp_path / "registry" / "trials" / "00000002" / "search" / "de").read_text()
    assert kept_there in reasons[0].values()


def test_recommendations_are_tried_too(tmp_path: Path) -> None:
    challenged(tmp_path, bad=None, exchanged="de")
    models = opened(tmp_path, canary=1.0, agreement=0.9)

    async def work(market: str, products: list[str], times: int) -> list[str]:
        found = []
        for _ in range(times):
            told = await models.recommend(market, products, 3, customer="c")
            found.append(told["served_by"]["bundle"].split("-")[0])
            await compared(models)
        return found

    assert asyncio.run(work("en", ["a1"], 22)) == ["two"] * 22
    german = asyncio.run(work("de", ["a1"], 24))
    assert german[:20] == ["two"] * 20
    assert german[-1] == "one"
    told = asyncio.run(models.about())["challenger"]["trial"]
    assert told["agreement"]["recommend en"] == 1.0
    assert told["stopped"].keys() == {"recommend de"}
    assert search(models, "de", ["c"]) == ["two"]  # which has not been found bad yet
    # What the champion refuses as well is no fault of the challenger.
    for _ in range(25):
        with pytest.raises(ApiError, match="none of these products"):
            asyncio.run(work("en", ["never"], 1))
    assert asyncio.run(models.about())["challenger"]["trial"]["agreement"]["recommend en"] == 1.0


def test_customer_service_is_tried_where_the_challenger_knows_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = challenged(tmp_path, bad=None)

    def ask(models: Models, language: str, times: int) -> list[str]:
        async def work() -> list[str]:
            found = []
            for number in range(times):
                question = list(ANSWERS[language].values())[number % 2]
                told = await models.support([question], 2, Asked(language, None, "c"), write=True)
                assert told["answer"] == f"{told['served_by']['bundle']} has written"
                found.append(told["served_by"]["bundle"].split("-")[0])
                await compared(models)
            return found

        return asyncio.run(work())

    async def written(reading: Reading, _question: str, source: Source) -> str:
        assert source.text
        return f"{reading.champion.event.bundle} has written"

    monkeypatch.setattr(Reading, "written", written)
    ignorant = opened(tmp_path, canary=1.0, confidence=0.9)
    assert ask(ignorant, "de", 25) == ["one"] * 25
    assert "agreement" in (told := asyncio.run(ignorant.about())["challenger"]["trial"])
    assert told["agreement"] == {}
    with monkeypatch.context() as unchanged:
        unchanged.setattr(promotion, "only_index", None)
        ignorant.watch.look()  # nothing was built since, so nothing is looked through
    assert ignorant.watch.said == ""
    exchanged = dict(zip(ANSWERS["de"], reversed(ANSWERS["de"].values()), strict=True))
    knowing(registry, tmp_path, {**ANSWERS, "de": exchanged})
    ignorant.watch.look()
    assert ask(ignorant, "en", 2) == ["two"] * 2  # answers that are built later are taken up
    models = opened(tmp_path, canary=1.0, confidence=0.9)
    assert ask(models, "en", 22) == ["two"] * 22
    assert ask(models, "de", 24)[-1] == "one"  # the same sources, but not the same answer
    told = asyncio.run(models.about())["challenger"]["trial"]
    assert (told["agreement"]["support en"], told["stopped"].keys()) == (1.0, {"support de"})
    challenger = registry.history().challenger
    assert challenger is not None
    answer = asyncio.run(models.write("q", Source("where", "en", "text", 0.9), challenger.bundle))
    assert answer == {"answer": f"{challenger.bundle} has written"}


def test_a_storage_that_is_away_stops_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    challenged(tmp_path, bad="de")
    one, other = (opened(tmp_path, canary=1.0, agreement=0.9) for _ in range(2))
    for models in (one, other):
        assert search(models, "de", ["c"] * 24)[-1] == "one"
    with monkeypatch.context() as broken:
        broken.setattr(storage, "create_bytes", lambda *_: (_ for _ in ()).throw(StorageError("away")))
        taken: list[str] = []
        broken.setattr(one.watch.trials._slot, "take", lambda: taken.append("changes"))
        one.watch.look()
    assert "away" in one.watch.said
    assert taken == ["changes"]  # its products change all the same
    assert search(one, "de", ["c"]) == ["one"]
    for models in (one, other, one):  # both tell it; the first counts
        models.watch.look()
        assert models.watch.said == ""
    assert search(opened(tmp_path, canary=1.0), "de", ["c"]) == ["one"]


def test_shadow_is_unseen_and_counted(tmp_path: Path) -> None:
    challenged(tmp_path, bad="de")
    models = opened(tmp_path, shadow=1.0, agreement=0.9)
    assert set(search(models, "de", [None] * 22)) == {"one"}
    assert set(search(models, "en", ["c"] * 3)) == {"one"}
    told = asyncio.run(models.about())["challenger"]["trial"]
    assert told["agreement"]["search de"] < 0.9
    assert told["agreement"]["search en"] == 1.0
    assert told["stopped"].keys() == {"search de"}


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
    assert trial.about()["stopped"]["de"].startswith("of the last 20 requests 20 failed, and 0%")


def test_a_challenger_that_is_too_slow_costs_its_share_of_the_time() -> None:
    trial = Trial(Slow("challenger"), Serving(canary=1.0, timeout_s=0.04))  # type: ignore[arg-type]

    async def ask(reading: Any) -> dict[str, Any]:
        await asyncio.sleep(10.0 if reading.name == "challenger" else 0.0)
        return {"results": [], "by": reading.name}

    now: Any = Slow("champion")

    async def work() -> list[str]:
        return [(await trial.answer(now, ask, "de", "c"))["by"] for _ in range(21)]

    assert asyncio.run(work()) == ["champion"] * 21
    assert trial.about()["stopped"]["de"].startswith("of the last 20 requests 20 failed")


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
