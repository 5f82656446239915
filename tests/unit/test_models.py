"""What serves: a champion and its own index, exchanged as a whole, and what is refused meanwhile."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlray import configuration
from mlray.access import StorageError
from mlray.config import Contrastive, Model, RunConfig, Storage
from mlray.models import embedder
from mlray.objectives.embedding import TextEmbedder
from mlray.release import bundle, markets
from mlray.release.changes import Changes, Product
from mlray.release.index import ProductIndex
from mlray.release.registry import Registry
from serve_app import adapters as in_memory
from serve_app.catalogue import Catalogue
from serve_app.errors import ApiError
from serve_app.models import Asked, Models
from tests.unit import tiny
from tests.unit.test_mixed import adapter
from tests.unit.test_registry import STRONG, judge

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"
)
ANSWERS = {
    "de": {"where": "wo ist mein Wasserkocher", "cold": "die Decke ist kalt"},
    "en": {"where": "where is my kettle", "back": "I want to give the blanket back"},
}
TITLES = {market: tiny.texts(market, 12, seed=4) for market in ("de", "en")}


def promoted(root: Path, name: str, seed: int, *, prefix: str, adapters: tuple[str, ...] = ()) -> Registry:
    """A registry whose champion is a small encoder with an index of the titles; ids begin with `prefix`."""
    registry, stage = Registry(str(root / "registry"), Storage()), root / f"stage-{name}"
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24, "max_positions": 62}
    network = embedder.build(
        Model.model_validate({"family": "xlm-roberta", **sizes}), Contrastive(), tiny.tokens(), None
    )
    embedder.export(network, tiny.tokens(), dict(network.named_parameters()), stage / "weights")
    judge(stage, str(stage / "weights"), STRONG)
    for path in (stage / "evaluation").iterdir():
        path.rename(stage / path.name)
    (stage / "evaluation").rmdir()
    config = configuration.load(None, ["objective.name=contrastive", "corpus.sequence_length=60"])
    (stage / "config.yaml").write_text(config.to_yaml())
    for number, tag in enumerate(adapters, start=1):
        adapter(stage / "weights", stage / "adapters" / tag, number)
    made = registry.put("bundles", stage, name, {"objective": "contrastive", "adapters": list(adapters)})
    read = bundle.open_reader(registry, made)
    index = ProductIndex(16)
    for market, titles in TITLES.items():
        names = [f"{prefix}{i}" for i in range(len(titles))]
        own_NH, plain_NH = markets.apart(read(titles, [market] * len(titles)), market, adapters)
        index.upsert(market, names, own_NH, titles, plain_NH)
    built = kept(registry, index, root / f"index-{name}", made)
    answers = ProductIndex(16)
    plain = bundle.open_embedder(registry, made)
    for language, texts in ANSWERS.items():
        answers.upsert(
            language, list(texts), plain.embed(list(texts.values())), [t.upper() for t in texts.values()]
        )
    knowledge = kept(registry, answers, root / f"answers-{name}", made)
    registry.append(
        registry.history(), action="promote", bundle=made, index=built, knowledge=knowledge, why=""
    )
    return registry


def kept(registry: Registry, index: ProductIndex, folder: Path, made: str) -> str:
    folder.mkdir()
    index.save(folder)
    about = {"bundle": made, "position": Changes(registry).position}
    return registry.put("indexes", folder, folder.name, about)


def opened(root: Path, **serving: Any) -> Models:
    values = {"release": {"registry_uri": str(root / "registry")}, "serving": {"watch_s": 1000.0, **serving}}
    return Models(RunConfig.model_validate(values))


def test_a_title_finds_its_product_and_vectors_are_those_of_the_bundle(tmp_path: Path) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    models = opened(tmp_path)
    champion = registry.history().champion
    assert champion is not None
    for market, titles in TITLES.items():
        for number, title in enumerate(titles):
            found = asyncio.run(models.search(title, market, 3, Asked()))
            assert found["results"][0]["title"] == title
            assert titles[int(found["results"][0]["id"][1:])] == title, number
            assert found["results"][0]["score"] == pytest.approx(1.0, abs=2e-3)  # the index keeps half floats
    assert found["served_by"] == {
        "bundle": champion.bundle,
        "index": champion.index,
        "language": found["served_by"]["language"],
        "known_by": "detected",
        "step": "base",
        "adapter": None,
    }
    with pytest.raises(ApiError, match="unknown_market"):
        asyncio.run(models.search("x", "us", 3, Asked()))
    told = asyncio.run(models.embed(TITLES["de"], Asked("de"), champion.bundle, None))
    expected = bundle.open_embedder(registry, champion.bundle).embed(TITLES["de"])
    assert np.abs(told["vectors"] - expected).max() < 1e-5
    reader = bundle.open_embedder(registry, champion.bundle)
    assert told["tokens"] == sum(len(cut) for cut in reader.cut(TITLES["de"]))
    half = asyncio.run(models.embed(TITLES["de"], Asked("de"), "champion", 8))["vectors"]
    short = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    assert np.abs(half - short).max() < 1e-5


def test_many_clients_are_read_in_few_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(tmp_path, "one", 0, prefix="a")
    passes: list[int] = []
    read = TextEmbedder.read

    def counted(self: TextEmbedder, cut: list[list[int]], names: Any = None) -> np.ndarray:
        passes.append(len(cut))
        return read(self, cut, names)

    monkeypatch.setattr(TextEmbedder, "read", counted)
    models = opened(tmp_path)

    async def ask() -> list[Any]:
        asked = [
            models.embed([title], Asked(market), None, None)
            for market, own in TITLES.items()
            for title in own
        ]
        return list(await asyncio.gather(*asked))

    together = asyncio.run(ask())
    assert sum(passes) == 24
    assert len(passes) <= 12
    alone = [
        asyncio.run(models.embed([title], Asked(), None, None)) for own in TITLES.values() for title in own
    ]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one["vectors"] - other["vectors"]).max() < 1e-5


def test_what_is_found_in_a_market_is_read_by_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a", adapters=("de", "ru"))
    models = opened(tmp_path)
    champion = registry.history().champion
    assert champion is not None
    base = bundle.open_embedder(registry, champion.bundle)
    german = bundle.open_embedder(registry, champion.bundle)
    german.load("de", Path(bundle.place_of(registry, champion.bundle, "de")))

    async def ask() -> list[Any]:
        asked = [models.search(t, market, 1, Asked()) for market, own in TITLES.items() for t in own]
        return list(await asyncio.gather(*asked))

    passes: list[int] = []
    read = TextEmbedder.read
    monkeypatch.setattr(
        TextEmbedder, "read", lambda self, cut, names: passes.append(len(cut)) or read(self, cut, names)
    )
    replies = asyncio.run(ask())
    monkeypatch.setattr(TextEmbedder, "read", read)
    assert sum(passes) == 24
    assert len(passes) <= 12
    steps = [(r["served_by"]["step"], r["served_by"]["adapter"]) for r in replies]
    assert steps == [("language", "de")] * 12 + [("base", None)] * 12
    for reply, title in zip(replies, [t for own in TITLES.values() for t in own], strict=True):
        assert reply["results"][0]["title"] == title
        assert reply["results"][0]["score"] == pytest.approx(1.0, abs=2e-3)  # one adapter at both ends
    for asked, expected, step in (
        (Asked("de"), german.embed(TITLES["de"], ["de"] * 12), "language"),
        (Asked("uk"), None, "related"),  # by the Russian one
        (Asked("fr"), base.embed(TITLES["de"]), "base"),
        (Asked(), base.embed(TITLES["de"]), "base"),  # detected: no other space without being asked
    ):
        told = asyncio.run(models.embed(TITLES["de"], asked, None, None))
        assert told["served_by"]["step"] == step
        if expected is not None:
            assert np.abs(told["vectors"] - expected).max() < 1e-5
    asyncio.run(models.upsert([Product("de", "new", "kalt und leise")]))
    assert asyncio.run(models.search("kalt und leise", "de", 1, Asked()))["results"][0]["score"] > 0.998


@pytest.mark.parametrize("pinned", [(), ("de",)])
def test_without_its_adapter_a_market_is_answered_by_the_base(
    tmp_path: Path, pinned: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_memory, "_AGAIN_S", 0.0)
    registry = promoted(tmp_path, "one", 0, prefix="a", adapters=("de",))
    champion = registry.history().champion
    assert champion is not None
    weights = Path(bundle.place_of(registry, champion.bundle, "de")) / "adapter_model.safetensors"
    models = opened(tmp_path, pinned=pinned)
    asyncio.run(models.upsert([Product("de", "new", "kalt und leise")]))
    kept = weights.rename(tmp_path / "kept")

    def step() -> str:
        for text, name in ((TITLES["de"][0], "a0"), ("kalt und leise", "new")):
            told = asyncio.run(models.search(text, "de", 12, Asked()))
            # By whichever model: the products were read by the same.
            score = next(one["score"] for one in told["results"] if one["id"] == name)
            assert score > 0.998
        return str(told["served_by"]["step"])

    assert step() == ("language" if pinned else "base")  # a pinned one is in memory before anybody asks
    kept.rename(weights)
    assert step() == "language"


def test_customer_service_answers_from_its_own_language_first(tmp_path: Path) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a", adapters=("de",))
    champion = registry.history().champion
    assert champion is not None
    models = opened(tmp_path, confidence=0.999)

    def ask(*messages: str, language: str | None = None) -> dict[str, Any]:
        return asyncio.run(models.support(list(messages), 2, Asked(language)))

    german = ask(ANSWERS["de"]["where"], language="de")
    assert (german["answer"], german["intent"], german["language"]) == (
        "WO IST MEIN WASSERKOCHER",
        "where",
        "de",
    )
    assert (german["hand_over"], german["scope"], german["served_by"]["step"]) == (False, "language", "base")
    assert german["confidence"] == pytest.approx(1.0, abs=2e-3)
    assert [one["id"] for one in german["sources"]] == ["where", "cold"]
    assert german["served_by"]["index"] == champion.knowledge
    austrian = ask(ANSWERS["de"]["cold"], language="gsw")
    assert (austrian["scope"], austrian["intent"]) == ("related", "cold")
    other = ask(ANSWERS["en"]["back"], language="de")  # sure in English alone
    assert (other["scope"], other["intent"], other["language"]) == ("other", "back", "en")
    unsure = ask("Regal", language="ja")
    assert (unsure["answer"], unsure["intent"], unsure["hand_over"]) == (None, None, True)
    assert 0 < unsure["confidence"] < 0.999
    assert len(unsure["sources"]) == 2
    # An order number tells no language: the message before it does.
    number = ask("Wo ist mein Wasserkocher, bitte?", "12345")
    assert (number["served_by"]["language"], number["served_by"]["known_by"]) == ("de", "detected")
    # By hand: the last message counts 1, the one before 0.3.
    read = bundle.open_embedder(registry, champion.bundle).embed
    before, last, source = read(["die Decke", "ist kalt", ANSWERS["de"]["cold"]])
    expected = float((last + 0.3 * before) @ source / np.linalg.norm(last + 0.3 * before))
    told = ask("die Decke", "ist kalt", language="de")
    scores = {one["id"]: one["score"] for one in told["sources"]}
    assert scores["cold"] == pytest.approx(expected, abs=3e-3)


def test_a_new_champion_has_the_adapters_in_memory_that_were_in_use(tmp_path: Path) -> None:
    promoted(tmp_path, "one", 0, prefix="a", adapters=("de", "en", "ru"))
    models = opened(tmp_path, adapters=2, pinned=["en"])
    now = models.watch.slot.now
    assert now is not None
    assert now.adapters.loaded == ["en"]
    asyncio.run(models.search("kalt", "de", 1, Asked()))
    assert now.adapters.loaded == ["en", "de"]
    promoted(tmp_path, "two", 1, prefix="b", adapters=("de", "en"))
    models.watch.look()
    after = models.watch.slot.now
    assert after is not None
    assert after is not now
    assert after.adapters.loaded == ["de", "en"]
    assert asyncio.run(models.search("kalt", "de", 1, Asked()))["served_by"]["step"] == "language"


def test_a_swap_never_mixes_a_model_with_another_index(tmp_path: Path) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    models = opened(tmp_path)
    first = registry.history().champion
    promoted(tmp_path, "two", 1, prefix="b")
    second = registry.history().champion
    assert first is not None
    assert second is not None
    letters = {first.bundle: "a", second.bundle: "b"}

    async def ask() -> list[dict[str, Any]]:
        before = [asyncio.create_task(models.search(title, "de", 3, Asked())) for title in TITLES["de"]]
        await asyncio.sleep(0.001)
        await asyncio.to_thread(models.watch.look)
        return list(
            await asyncio.gather(*before, *(models.search(t, "en", 3, Asked()) for t in TITLES["en"]))
        )

    replies = asyncio.run(ask())
    for reply in replies:
        assert {hit["id"][0] for hit in reply["results"]} == {letters[reply["served_by"]["bundle"]]}
        assert reply["results"][0]["score"] == pytest.approx(1.0, abs=2e-3)
    assert replies[0]["served_by"]["bundle"] == first.bundle
    assert {reply["served_by"]["index"] for reply in replies[12:]} == {second.index}


def test_a_damaged_champion_is_not_taken_up(tmp_path: Path) -> None:
    models = opened(tmp_path)
    with pytest.raises(ApiError, match="no_champion"):
        asyncio.run(models.embed(["x"], Asked(), None, None))
    registry = promoted(tmp_path, "one", 0, prefix="a")
    first = registry.history().champion
    models.watch.look()
    promoted(tmp_path, "two", 1, prefix="b")
    second = registry.history().champion
    assert first is not None
    assert second is not None
    weights = Path(registry.place("bundles", second.bundle)) / "weights" / "model.safetensors"
    weights.write_bytes(b"altered")
    models.watch.look()
    told = asyncio.run(models.about())
    assert told["champion"]["id"] == first.bundle
    assert told["fault"] == "the champion cannot be taken up; the log of the server says why"
    assert "weights/model.safetensors does not match its sha256" in models.watch.said
    assert asyncio.run(models.embed(["x"], Asked(), None, None))["served_by"]["bundle"] == first.bundle


def test_a_new_server_falls_back_to_the_newest_champion_that_can_be_opened(tmp_path: Path) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    for name, seed in (("two", 1), ("three", 2)):
        promoted(tmp_path, name, seed, prefix="b")
    first, *damaged = registry.history().reigns
    for event in damaged:
        (Path(registry.place("bundles", event.bundle)) / "report.json").write_text("{}")
    models = opened(tmp_path)
    told = asyncio.run(models.about())
    assert told["champion"]["id"] == first.bundle
    assert told["fault"] == "the champion cannot be taken up; the log of the server says why"
    assert f"{damaged[-1].bundle}/report.json does not match" in models.watch.said.replace(
        " is damaged: ", "/"
    )
    assert asyncio.run(models.embed(["x"], Asked(), None, None))["served_by"]["bundle"] == first.bundle


def test_the_challenger_is_told_with_its_report(tmp_path: Path) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    models = opened(tmp_path)
    assert asyncio.run(models.about())["challenger"] is None
    made = registry.put("bundles", tmp_path / "stage-one", "next", {"objective": "contrastive"})
    registry.append(registry.history(), action="challenge", bundle=made, index=None, why="better")
    models.watch.look()
    told = asyncio.run(models.about())["challenger"]
    assert told.keys() == {"id", "since", "why", "report"}
    assert (told["id"], told["why"]) == (made, "better")
    assert told["report"]["retrieval"]["de-en"]["R@1"].value == 100.0


def test_a_change_that_is_slow_to_read_is_told_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    models, go = opened(tmp_path, timeout_s=0.2), threading.Event()
    take = Catalogue.take
    monkeypatch.setattr(Catalogue, "take", lambda self: go.wait(10) and take(self))

    async def work() -> tuple[dict[str, Any], list[str]]:
        told = await models.upsert([Product("de", "new", "warm leise Regal")])
        assert Changes(registry).position == 1
        deleted = await models.delete([("de", "a0")])  # is written, too, and does not wait for the reading
        assert (deleted["change"], deleted["taken_up"]) == (2, False)
        # What is written, and not there yet, can be deleted, once.
        await models.upsert([Product("de", "brief", "warm leise Regal")])
        deleted = await models.delete([("de", "brief"), ("de", "a0")])
        assert (deleted["change"], deleted["unknown"]) == (4, [("de", "a0")])
        go.set()
        while models._changes:
            await asyncio.sleep(0.01)
        found = await models.search("warm leise Regal", "de", 1, Asked())
        return told, [hit["id"] for hit in found["results"]]

    told, found = asyncio.run(work())
    assert (told["change"], told["taken_up"]) == (1, False)
    assert found == ["new"]
    assert asyncio.run(models.upsert([Product("de", "more", "leise")]))["taken_up"]


def test_products_come_and_go_wherever_an_index_is_served(tmp_path: Path) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    models, other = opened(tmp_path), opened(tmp_path)
    new = [Product("de", "new", "warm leise Regal\nund mehr"), Product("us", "new", TITLES["en"][0])]
    told = asyncio.run(models.upsert([Product("de", "new", "anders"), *new]))
    assert (told["change"], told["products"], told["unknown"]) == (1, 3, [])

    def found(where: Models, market: str, text: str) -> list[tuple[str, str]]:
        hits = asyncio.run(where.search(text, market, 1, Asked()))["results"]
        return [(hit["id"], hit["title"]) for hit in hits]

    assert found(models, "de", new[0].text) == [("new", "warm leise Regal")]
    assert found(models, "us", "x") == [("new", TITLES["en"][0])]
    assert found(other, "de", new[0].text) != [("new", "warm leise Regal")]
    other.watch.look()
    assert found(other, "de", new[0].text) == [("new", "warm leise Regal")]
    told = asyncio.run(other.delete([("de", "a0"), ("de", "never"), ("us", "new")]))
    assert (told["change"], told["products"], told["unknown"]) == (2, 2, [("de", "never")])
    with pytest.raises(ApiError, match="unknown_product"):
        asyncio.run(other.delete([("us", "new")]))
    with pytest.raises(ApiError, match="unknown_market"):
        found(other, "us", "x")
    asyncio.run(models.upsert([Product("de", "a1", "anders")]))  # takes up the other's change before its own
    again = opened(tmp_path)
    for where in (models, again):
        markets = asyncio.run(where.about())["champion"]["markets"]
        assert markets == {"de": 12, "en": 12}  # one came, one went
        assert found(where, "de", "anders") == [("a1", "anders")]
    champion = registry.history().champion
    assert champion is not None
    asyncio.run(models.upsert([Product("de", "late", "spaet")]))  # 4
    place = Path(registry.uri) / "changes" / "00000005.json"
    place.write_text("{")
    told = asyncio.run(
        models.upsert([Product("de", "later", "noch einer")])
    )  # kept, though it cannot be taken up
    assert (told["change"], told["taken_up"]) == (6, False)
    late = opened(tmp_path)  # serves with what could be read
    assert found(late, "de", "spaet") == [("late", "spaet")]
    models.watch.look()
    assert f"{place} is no change of products" in models.watch.said
    told = asyncio.run(models.about())
    assert told["fault"] == "its products cannot be taken up; the log of the server says why"
    assert found(models, "de", "anders") == [("a1", "anders")]


def test_a_change_that_cannot_be_written_may_be_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(tmp_path, "one", 0, prefix="a")
    models = opened(tmp_path)

    def full(*_: object) -> int:
        raise StorageError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Changes, "append", full)
        for asked in (models.upsert([Product("de", "new", "warm")]), models.delete([("de", "a0")])):
            with pytest.raises(ApiError) as refused:
                asyncio.run(asked)
            assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (
                503,
                "storage",
                5.0,
            )
        patched.setattr(Changes, "after", full)
        with pytest.raises(ApiError, match="storage"):  # whether it is there cannot be told
            asyncio.run(models.delete([("de", "a0")]))
    assert asyncio.run(models.delete([("de", "a0")]))["change"] == 1


def test_products_that_cannot_be_read_do_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    promoted(tmp_path, "one", 0, prefix="a")
    read = markets.plain

    def reader(*told: Any) -> Any:
        inner = read(*told)

        def reading(texts: list[str], tags: list[str]) -> Any:
            if "odd" in texts:
                raise ValueError("no tag")
            return inner(texts, tags)

        return reading

    monkeypatch.setattr(markets, "plain", reader)
    odd = opened(tmp_path)
    told = asyncio.run(odd.upsert([Product("de", "bad", "odd"), Product("de", "new", "warm leise Regal")]))
    assert told["taken_up"]
    assert "a product of a change is left out: ValueError" in caplog.text
    assert "bad" not in caplog.text
    assert asyncio.run(odd.upsert([Product("us", "bad", "odd")]))["taken_up"]  # of all, none
    found = asyncio.run(odd.search("warm leise Regal", "de", 1, Asked()))
    assert [hit["id"] for hit in found["results"]] == ["new"]


def test_what_a_killed_writer_has_left_is_no_change(tmp_path: Path) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    asyncio.run(opened(tmp_path).upsert([Product("de", "new", "warm leise Regal")]))
    (Path(registry.uri) / "changes" / ".00000002.json.4f").write_text("{")
    assert Changes(registry).position == 1


def test_a_market_may_have_a_name_that_is_no_language(tmp_path: Path) -> None:
    promoted(tmp_path, "one", 0, prefix="a", adapters=("de",))
    models = opened(tmp_path)
    for market in ("de-b2b", "fr-be-fr", "de-eur-b2b"):  # which have the form of tags
        told = asyncio.run(models.upsert([Product(market, "new", "warm leise Regal")]))
        assert told["products"] == 1
    for where in (models, opened(tmp_path)):
        found = asyncio.run(where.search("warm leise Regal", "de-b2b", 1, Asked()))
        assert [hit["id"] for hit in found["results"]] == ["new"]
        assert found["served_by"]["step"] == "base"


def test_what_has_changed_holds_after_a_promotion_and_a_rollback(tmp_path: Path) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    models = opened(tmp_path)
    asyncio.run(models.delete([("de", "a0")]))
    promoted(
        tmp_path, "two", 1, prefix="a"
    )  # begun after that change, by a catalogue that has the product again
    models.watch.look()
    assert asyncio.run(models.about())["champion"]["markets"]["de"] == 12
    asyncio.run(models.delete([("de", "a1")]))
    asyncio.run(models.upsert([Product("fr", "new", "nouveau")]))
    first = registry.history().events[0]
    registry.append(
        registry.history(), action="rollback", bundle=first.bundle, index=first.index, knowledge=None, why=""
    )
    models.watch.look()
    assert asyncio.run(models.about())["champion"]["markets"] == {"de": 10, "en": 12, "fr": 1}


def test_a_made_up_language_has_no_queue_of_its_own(tmp_path: Path) -> None:
    promoted(tmp_path, "one", 0, prefix="a")
    models = opened(tmp_path, queued_tokens=10)

    async def flood() -> list[Any]:
        asked = [
            models.embed([TITLES["de"][0]], Asked(f"tlh-x-a{number}"), None, None) for number in range(50)
        ]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    assert any(isinstance(one, ApiError) and one.status == 429 for one in asyncio.run(flood()))


def test_the_watch_goes_on_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    models = opened(tmp_path)

    def broken(*_: object) -> None:
        raise KeyError("anything")

    monkeypatch.setattr(Registry, "history", broken)
    models.watch.look()
    told = asyncio.run(models.about())
    assert models.watch.said == "KeyError while a champion was looked for"
    assert told["fault"].startswith("the champion cannot be taken up")
    assert told["champion"]["id"]
    monkeypatch.undo()
    models.watch.look()
    assert asyncio.run(models.about())["fault"] == ""
    assert registry.history().champion


def test_a_champion_that_could_not_be_reached_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = opened(tmp_path)
    registry = promoted(tmp_path, "one", 0, prefix="a")
    tried: list[str] = []
    check = Registry.check

    def away(self: Registry, kind: str, name: str) -> None:
        tried.append(name)
        raise StorageError("the storage is away")

    monkeypatch.setattr(Registry, "check", away)
    for _ in range(2):
        models.watch.look()
        assert models.watch.said == "the storage is away"
    assert len(tried) == 2
    monkeypatch.setattr(Registry, "check", check)
    models.watch.look()
    champion = registry.history().champion
    assert champion is not None
    assert asyncio.run(models.about())["champion"]["id"] == champion.bundle


def test_a_damaged_champion_is_looked_at_once_and_told_as_long_as_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = promoted(tmp_path, "one", 0, prefix="a")
    champion = registry.history().champion
    assert champion is not None
    (Path(registry.place("bundles", champion.bundle)) / "report.json").write_text("{}")
    models = opened(tmp_path)
    damaged = models.watch.said
    assert "report.json does not match its sha256" in damaged
    with monkeypatch.context() as away:
        away.setattr(Registry, "history", lambda *_: (_ for _ in ()).throw(StorageError("away")))
        models.watch.look()
        assert models.watch.said == "away"
    monkeypatch.setattr(Registry, "check", lambda *_: pytest.fail("it was read again"))
    models.watch.look()
    assert models.watch.said == damaged


def test_what_cannot_be_answered_is_refused(tmp_path: Path) -> None:
    promoted(tmp_path, "one", 0, prefix="a")
    models = opened(tmp_path, queued_tokens=10)
    with pytest.raises(ApiError, match="unknown_language"):
        asyncio.run(models.support(["x"], 1, Asked("xx")))
    for refusal, ask in {
        "unknown_language": models.embed(["x"], Asked("xx"), None, None),
        "unknown_model": models.embed(["x"], Asked(), "gpt-4", None),
        "dimensions: the model makes 16": models.embed(["x"], Asked(), None, 17),
    }.items():
        with pytest.raises(ApiError, match=refusal):
            asyncio.run(ask)

    async def flood() -> list[Any]:
        asked = [models.embed([TITLES["de"][0]], Asked("de"), None, None) for _ in range(50)]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    replies = asyncio.run(flood())
    refused = [one for one in replies if isinstance(one, ApiError)]
    assert {(one.status, one.code) for one in refused} == {(429, "overloaded")}
    assert all(one.retry_after_s and one.retry_after_s > 0 for one in refused)
    assert len(refused) < 50
