"""Recommendations that are served: by sessions where the bundle has learnt from them, else by texts; its bundle."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlray import configuration, seal
from mlray.config import Adapter, ConfigError, Model, RunConfig
from mlray.models import items as catalogue
from mlray.models import recommender, tokenizer
from mlray.objectives.recommending import NextItem
from mlray.release import bundle, companions, promotion
from mlray.release.bundle import Beside
from mlray.release.changes import Product
from mlray.release.index import ProductIndex
from mlray.release.registry import Registry, open_registry
from serve_app import recommending, routing
from serve_app.errors import ApiError
from serve_app.models import Asked, Models
from tests.unit import test_models, test_registry
from tests.unit.test_mixed import moved
from tests.unit.test_models import TITLES, opened, promoted

SOLD = [f"a{number}" for number in range(12)]
"""Of `promoted`: products of both markets."""
MARKETS = ["de", "mx"]


def trained(folder: Path) -> RunConfig:
    """A recommender of the products that are sold, but for the last two, and of one that is not sold any more."""
    counts = dict.fromkeys([*SOLD[:10], "gone", "query:wasserkocher", "query:leise"], 1)
    section = {"algorithm": "items", "vocab_size": 64}
    config = configuration.build(
        {
            "run": {"name": "sessions"},
            "objective": {"name": "next_item"},
            "tokenizer": section,
            "model": {
                "family": "llama",
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
                "max_positions": 16,
            },
            "corpus": {"sequence_length": 8},
        }
    )
    tokens = catalogue.of_items(counts, config.tokenizer, MARKETS)
    torch.manual_seed(3)
    sizes = Model.model_validate({**config.model.model_dump(), "intermediate_size": 24})
    network = recommender.build(sizes, tokens)
    recommender.export(network, tokens, dict(network.named_parameters()), folder)
    return config


def with_sessions(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Models, NextItem]:
    """The champion of `promoted`, with a recommender beside it."""
    config = trained(root / "sessions")
    model = NextItem(config, root / "sessions")
    beside = {"recommender": model}
    monkeypatch.setattr(companions, "open_companion", lambda _, __, name, **___: beside.get(name))
    promoted(root, "one", 0, prefix="a")
    return opened(root), model


def ask(models: Models, market: str, products: list[str], k: int = 3) -> dict[str, Any]:
    return asyncio.run(models.recommend(market, products, k))


def test_sessions_rank_what_is_sold_without_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, model = with_sessions(tmp_path, monkeypatch)
    found = ask(models, "de", ["a3", "a11", "gone", "a5"], k=5)
    scores_V = model.scores(["a3 a11 gone a5"], ["de"])[0]
    seen = {"a3", "a5", "gone"}
    best = sorted((one for one in SOLD[:10] if one not in seen), key=lambda one: -scores_V[model.items[one]])
    assert [hit["id"] for hit in found["results"]] == best[:5]
    assert [hit["score"] for hit in found["results"]] == pytest.approx(
        [float(scores_V[model.items[one]]) for one in best[:5]]
    )
    assert found["results"][0]["title"] == TITLES["de"][int(best[0][1:])]
    assert {hit["by"] for hit in found["results"]} == {"sessions"}
    assert found["unknown"] == []
    assert found["served_by"].keys() == {"bundle", "index", "step", "adapter"}
    assert (found["served_by"]["step"], found["served_by"]["adapter"]) == ("base", None)
    everything = ask(models, "de", ["a3"], k=100)["results"]
    # Of the two that nobody has bought texts tell; of twelve one is the customer's.
    assert [hit["by"] for hit in everything] == ["sessions"] * 9 + ["texts"] * 2
    assert {hit["id"] for hit in everything} == set(SOLD) - {"a3"}


def test_a_session_that_the_model_knows_nothing_of_is_served_by_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, _ = with_sessions(tmp_path, monkeypatch)
    found = ask(models, "de", ["a10", "a11"], k=4)
    assert [hit["by"] for hit in found["results"]] == ["texts"] * 4


def test_a_product_that_goes_while_it_is_asked_for_is_no_fault(tmp_path: Path) -> None:
    promoted(tmp_path, "one", 0, prefix="a")
    now = opened(tmp_path).watch.slot.now
    assert now is not None
    assert now.champion.catalogue is not None
    like = now.champion.catalogue.like
    assert like("de", ["gone", "a10"], 4) == like("de", ["a10"], 4) != []
    assert like("de", ["gone"], 4) == []


def test_a_market_is_no_language(tmp_path: Path) -> None:
    config = trained(tmp_path / "sessions")
    sessions = recommending.Sessions.of(NextItem(config, tmp_path / "sessions"), config.serving)
    asked = ("de", "de-AT", "mx", "lb", "gl")
    assert [sessions.market(tag) for tag in asked] == ["de", "de", "mx", None, None]


def test_somebody_new_gets_what_the_market_buys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, model = with_sessions(tmp_path, monkeypatch)
    found = ask(models, "de", [], k=1)
    scores_V = model.scores([""], ["de"])[0]
    assert found["results"][0]["id"] == max(SOLD[:10], key=lambda one: scores_V[model.items[one]])


def test_what_was_searched_for_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, model = with_sessions(tmp_path, monkeypatch)
    assert not any(name.startswith("query:") for name in model.items)
    found = asyncio.run(models.recommend("de", ["a1"], 9, "Wasserkocher, leise und unheard-of"))
    scores_V = model.scores(["query:wasserkocher query:leise a1"], ["de"])[0]
    for hit in found["results"]:
        assert hit["score"] == pytest.approx(float(scores_V[model.items[hit["id"]]]), abs=1e-5)
    without = asyncio.run(models.recommend("de", ["a1"], 9))
    assert [hit["score"] for hit in without["results"]] != [hit["score"] for hit in found["results"]]


def test_a_market_without_sessions_is_served_by_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, _ = with_sessions(tmp_path, monkeypatch)
    champion = models.watch.slot.now.champion if models.watch.slot.now else None
    assert champion is not None
    found = ask(models, "en", ["a2", "a11", "never"], k=4)
    vectors = champion.embedder.embed(TITLES["en"])
    mean = vectors[[2, 11]].mean(axis=0)
    near = vectors @ (mean / np.linalg.norm(mean))
    best = [place for place in np.argsort(-near) if place not in {2, 11}][:4]
    assert [hit["score"] for hit in found["results"]] == pytest.approx(near[best].tolist(), abs=2e-3)
    assert {hit["by"] for hit in found["results"]} == {"texts"}
    assert found["unknown"] == ["never"]
    assert not {"a2", "a11"} & {hit["id"] for hit in found["results"]}


@pytest.mark.parametrize(
    ("market", "products", "status", "code"),
    [
        ("fr", ["a1"], 404, "unknown_market"),
        ("mx", ["a1"], 404, "unknown_market"),  # the recommender knows it, and nothing is sold there
        ("de", ["never", "ever"], 404, "unknown_product"),
        ("en", [], 422, "invalid_request"),
    ],
)
def test_what_cannot_be_recommended_is_refused(
    market: str, products: list[str], status: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, _ = with_sessions(tmp_path, monkeypatch)
    with pytest.raises(ApiError) as told:
        ask(models, market, products)
    assert (told.value.status, told.value.code) == (status, code)


def test_customers_of_several_markets_share_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = trained(tmp_path / "sessions")
    model = NextItem(config, tmp_path / "sessions")
    passes: list[list[str]] = []
    scores = NextItem.scores

    def counted(self: NextItem, sessions: Any, markets: Any) -> np.ndarray:
        passes.append(list(markets))
        return scores(self, sessions, markets)

    monkeypatch.setattr(NextItem, "scores", counted)

    async def together() -> list[np.ndarray]:
        sessions = recommending.Sessions.of(model, RunConfig().serving)
        asked = [
            sessions.batcher.submit(market, [recommending.Session((f"a{number}", "a1"), market, "")])
            for number in range(8)
            for market in MARKETS
        ]
        return [rows[0] for rows in await asyncio.gather(*asked)]

    found = asyncio.run(together())
    assert sum(map(len, passes)) == 16
    assert len(passes) <= 3
    alone = [scores(model, [f"a{number} a1"], [market])[0] for number in range(8) for market in MARKETS]
    np.testing.assert_allclose(np.stack(found), np.stack(alone), atol=1e-5)


def judged(folder: Path, task: str, value: float = 50.0, **about: str) -> None:
    """A report of one cell, and its prediction."""
    folder.mkdir(exist_ok=True)
    figure = {"value": value, "low": 40.0, "high": 60.0, "n": 1, "signature": "x"}
    cells = {task: {"de": {"MRR": figure}}}
    (folder / "report.json").write_text(json.dumps({"about": about, "cells": cells, "empty": {}}))
    row = {"task": task, "language": "de", "prediction": "a1", "reference": "a1"}
    (folder / "predictions.jsonl").write_text(json.dumps(row) + "\n")


def test_a_bundle_holds_its_recommender_and_what_it_is_judged_by(tmp_path: Path) -> None:
    config, stage = trained(tmp_path / "sessions"), tmp_path / "stage"
    judged(stage, "retrieval")
    judged(tmp_path / "judged", "recommendation")
    # A bundle of sessions has no second one, whose figures would stand in the place of its own.
    (stage / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(
        ConfigError, match=r"--recommender: the bundle's own model is one of objective.name=next_item"
    ):
        companions.add(stage, "recommender", config, tmp_path / "sessions", tmp_path / "judged")
    (stage / "config.yaml").write_text("objective: {name: contrastive}")
    companions.add(stage, "recommender", config, tmp_path / "sessions", tmp_path / "judged")
    report = json.loads((stage / "report.json").read_text())
    assert report["cells"].keys() == {"retrieval", "recommendation"}
    rows = [json.loads(line)["task"] for line in (stage / "predictions.jsonl").read_text().splitlines()]
    assert rows == ["retrieval", "recommendation"]
    registry = Registry(str(tmp_path / "registry"), config.storage)
    made = registry.put("bundles", stage, "shop", {"objective": "contrastive", "recommender": "sessions"})
    opened_one = companions.open_companion(registry, made, "recommender")
    assert opened_one is not None
    own = NextItem(config, tmp_path / "sessions")
    np.testing.assert_array_equal(opened_one.scores(["a1"], ["de"]), own.scores(["a1"], ["de"]))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x").write_text("x")
    without = registry.put("bundles", tmp_path / "none", "none", {"objective": "contrastive"})
    assert companions.open_companion(registry, without, "recommender") is None


def adapter(base: Path, config: RunConfig, folder: Path, seed: int) -> Path:
    """An adapter of the recommender that changes much."""
    tokens = tokenizer.load(base)
    network = recommender.build(config.model, tokens, base)
    return moved(network, Adapter(kind="lora", rank=2), seed, "next_item", tokens, folder)


ONE_PASS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
)


@ONE_PASS
def test_sessions_of_a_market_are_read_by_its_adapter_in_the_same_pass(tmp_path: Path) -> None:
    config, base = trained(tmp_path / "sessions"), tmp_path / "sessions"
    places = {
        market: adapter(base, config, tmp_path / market, seed) for seed, market in enumerate(MARKETS, 1)
    }
    model = NextItem(config, base)
    plain_QV = model.scores(["a1 a2", "a1 a2", "a3"], ["de", "mx", "de"])
    model.load("mx", places["mx"])
    passes: list[int] = []
    model._model.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[no-untyped-call]
    found_QV = model.scores(["a1 a2", "a1 a2", "a3"], ["de", "mx", "de"])
    assert len(passes) == 1
    np.testing.assert_allclose(found_QV[[0, 2]], plain_QV[[0, 2]], atol=1e-5)
    alone_QV = NextItem(config, base, places["mx"]).scores(["a1 a2"], ["mx"])
    np.testing.assert_allclose(found_QV[1], alone_QV[0], atol=1e-5)
    assert np.abs(found_QV[1] - plain_QV[1]).max() > 0.1
    served = recommending.Sessions.of(model, config.serving)
    assert served.step("mx-MX") == routing.Step("language", "mx")
    assert served.step("de") == served.step("gl") == routing.BASE
    model.load("de", places["de"])
    both_QV = model.scores(["a1 a2", "a1 a2"], ["de", "mx"])
    np.testing.assert_allclose(
        both_QV[0], NextItem(config, base, places["de"]).scores(["a1 a2"], ["de"])[0], atol=1e-5
    )
    np.testing.assert_allclose(both_QV[1], alone_QV[0], atol=1e-5)


@ONE_PASS
def test_a_bundle_holds_adapters_of_its_recommenders_markets(tmp_path: Path) -> None:
    config, stage = trained(tmp_path / "sessions"), tmp_path / "stage"
    judged(stage, "retrieval")
    judged(tmp_path / "judged", "recommendation")
    judged(tmp_path / "own", "recommendation", value=70.0)
    (stage / "config.yaml").write_text(configuration.build({"objective": {"name": "contrastive"}}).to_yaml())
    with pytest.raises(ConfigError, match="--recommender-adapter needs --recommender"):
        companions.add_market(stage, "de", tmp_path, tmp_path / "own")
    companions.add(stage, "recommender", config, tmp_path / "sessions", tmp_path / "judged")
    place = adapter(tmp_path / "sessions", config, tmp_path / "de", 1)
    with pytest.raises(ConfigError, match="no token for the market 'uk'"):
        companions.add_market(stage, "uk", place, tmp_path / "own")
    with pytest.raises(ConfigError, match="the adapter for mx was not judged where the bundle was"):
        companions.add_market(stage, "mx", place, tmp_path / "own")
    companions.add_market(stage, "de", place, tmp_path / "own")
    report = json.loads((stage / "report.json").read_text())
    assert report["cells"]["recommendation"]["de"]["MRR"]["value"] == 70.0
    assert report["cells"]["retrieval"]["de"]["MRR"]["value"] == 50.0
    registry = Registry(str(tmp_path / "registry"), config.storage)
    made = registry.put("bundles", stage, "shop", {"objective": "contrastive", "recommender": "sessions"})
    opened_one = companions.open_companion(registry, made, "recommender")
    assert opened_one is not None
    expected = NextItem(config, tmp_path / "sessions", place).scores(["a1"], ["de"])
    np.testing.assert_allclose(opened_one.scores(["a1"], ["de"]), expected, atol=1e-5)


def ended(folder: Path, name: str, write: Callable[[Path], object], config: RunConfig, value: float) -> str:
    """The folder of a run that has ended and was judged."""
    root = folder / "runs" / name
    weights = test_registry.trained(root, write, config)
    judged(root / "evaluation", "recommendation", value, sha256=seal.digest(weights))
    return str(root)


@ONE_PASS
def test_a_shop_without_texts_is_served_by_its_recommender_alone(tmp_path: Path) -> None:
    """A run becomes a bundle by itself, and its index holds what it has learnt of the ids that are sold."""
    config, base = trained(tmp_path / "sessions"), tmp_path / "sessions"
    run = ended(tmp_path, "items", lambda place: shutil.copytree(base, place), config, 50.0)
    kept = Path(run) / "checkpoints" / "step-00000002" / "weights"
    lora = {"kind": "lora", "rank": 2}
    adapted = config.model_copy(
        update={
            "adapter": Adapter.model_validate(lora),
            "model": config.model.model_copy(update={"path": str(kept)}),
        }
    )
    own = ended(tmp_path, "de", lambda place: adapter(kept, config, place, 1), adapted, 70.0)
    place = {"registry_uri": str(tmp_path / "registry")}
    release = RunConfig.model_validate({"release": place, "serving": {"watch_s": 1000.0}})
    event = promotion.challenge(release, run, "", Beside(sessions={"de": own}))
    registry = open_registry(release)
    report, _ = bundle.report_of(registry, event.bundle)
    assert report.cells["recommendation"]["de"]["MRR"].value == 70.0

    table_VH = load_file(base / "model.safetensors")["model.embed_tokens.weight"].numpy()
    model = NextItem(config, base)
    rows_NH = table_VH[[model.items[one] for one in SOLD[:10]]]
    vectors_NH = bundle.open_reader(registry, event.bundle)(SOLD, ["de"] * len(SOLD))
    expected_NH = rows_NH / np.linalg.norm(rows_NH, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors_NH[:10], expected_NH, atol=1e-6)
    assert not vectors_NH[10:].any()  # of which it has learnt nothing
    index = ProductIndex(vectors_NH.shape[1])
    for market in ("de", "lb"):
        index.upsert(market, SOLD, vectors_NH, SOLD)
    made = test_models.kept(registry, index, tmp_path / "index", event.bundle)
    promotion.promote(release, None, made, "")

    models = Models(release)
    found = ask(models, "de", ["a3", "a5"], k=4)
    model.load("de", Path(own) / "checkpoints" / "step-00000002" / "weights")
    scores_V = model.scores(["a3 a5"], ["de"])[0]
    best = sorted(set(SOLD[:10]) - {"a3", "a5"}, key=lambda one: -scores_V[model.items[one]])
    assert [(hit["id"], hit["by"]) for hit in found["results"]] == [(one, "sessions") for one in best[:4]]
    assert (found["served_by"]["step"], found["served_by"]["adapter"]) == ("language", "de")
    near = ask(models, "lb", ["a3"], k=4)["results"]  # a market that it has not learnt of
    cosine = dict(zip(SOLD, expected_NH @ expected_NH[3], strict=False))
    likest = sorted(set(SOLD[:10]) - {"a3"}, key=lambda one: -cosine[one])
    assert [(hit["id"], hit["by"]) for hit in near] == [(one, "items") for one in likest[:4]]
    for asked in (models.search("kettle", "de", 3, Asked()), models.embed(["kettle"], Asked(), None, None)):
        with pytest.raises(ApiError, match="makes no vectors of texts") as refused:
            asyncio.run(asked)
        assert (refused.value.status, refused.value.code) == (404, "no_encoder")
    asyncio.run(models.upsert([Product("lb", best[0], "Wasserkocher"), Product("de", "a13", "Regal")]))
    renamed = ask(models, "lb", ["a3"], k=4)["results"]  # a title changes nothing of what is learnt of an id
    assert [(hit["id"], hit["score"]) for hit in renamed] == [(hit["id"], hit["score"]) for hit in near]
    asyncio.run(models.delete([("de", best[0])]))
    assert ask(models, "de", ["a3", "a5"], k=1)["results"][0]["id"] == best[1]


def test_what_is_no_recommender_is_refused(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    other = configuration.build({"run": {"name": "words"}, "objective": {"name": "masked"}})
    with pytest.raises(
        ConfigError, match=r"takes a whole model of objective\.name=next_item, and words is masked"
    ):
        companions.add(stage, "recommender", other, tmp_path, tmp_path)
    assert not list(stage.iterdir())
