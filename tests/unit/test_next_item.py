"""Recommendation: sessions from rows, how they are cut, the sampled softmax, and the ranks of a market."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlray import configuration
from mlray.config import ConfigError, Model, Objective, Recommendation, Source, Storage, Tokenizer, Train
from mlray.corpus import packing, records, sources
from mlray.corpus.fields import Record
from mlray.corpus.testsets import Case
from mlray.corpus.windows import Window
from mlray.evaluation import evaluate, recommendation
from mlray.models import backbone, recommender, tokenizer
from mlray.models import items as catalogue
from mlray.objectives import item_vectors, next_item
from mlray.objectives.recommending import NextItem
from mlray.objectives.table import Task
from mlray.schema import NO_TARGET, SEPARATOR, PackedBatch
from mlray.training import loop
from mlray.training.engine import Engine
from tests.unit import tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

SETTINGS = Storage()
MARKETS = ["de", "jp"]
NONE = NO_TARGET
COUNTS = {"kettle": 9, "cup": 9, "lamp": 5, "rug": 2, "__de__": 7}


def tokens(size: int = 64) -> Any:
    return catalogue.of_items(COUNTS, Tokenizer(algorithm="items", vocab_size=size), MARKETS)


def ids(text: str) -> list[int]:
    found: list[int] = tokens().convert_tokens_to_ids(text.split())
    return found


def found_in(source: Source) -> list[Record]:
    """The records of a source of one file."""
    (file,) = sources.list_files((source,), SETTINGS)
    (chunk,) = records.chunks(file, 1 << 20, SETTINGS)
    return [one for batch in records.read(chunk, 1000, SETTINGS) for one in batch]


def read(path: Path, **settings: Any) -> list[tuple[str, str, str, str]]:
    source = Source(uri=str(path), text="item", **{"session": "user", "language": "de", **settings})
    return [(one.text, one.pair, one.reason, one.key) for one in found_in(source)]


def table(path: Path, rows: str) -> Path:
    path.write_text(f"user\titem\tmarket\n{rows}".replace(" ", "\t"), encoding="utf-8")
    return path


def test_neighbouring_rows_of_a_customer_are_a_session(tmp_path: Path) -> None:
    place = table(tmp_path / "a.tsv", "u1 cup de\nu1 lamp jp\nu2 rug de\nu1 rug de\n")
    assert read(place, format="tsv", part_by="user") == [
        ("cup lamp", "", "", "u1"),
        ("rug", "", "", "u2"),
        ("rug", "", "", "u1"),
    ]


def test_the_last_item_is_held_back(tmp_path: Path) -> None:
    place = table(tmp_path / "a.tsv", "u1 cup de\nu1 cup de\nu1 lamp de\nu1 rug de\nu1 rug de\nu2 rug de\n")
    assert read(place, format="tsv", last_is_pair=True) == [
        ("cup lamp", "rug", "", ""),
        ("", "", "a session of one item", ""),
    ]


def test_a_bad_row_of_a_session_stays_for_itself(tmp_path: Path) -> None:
    place = table(tmp_path / "a.tsv", "u1 cup de\nu1 lamp\nu1 rug de\n")
    found = read(place, format="tsv")
    assert [(text, reason) for text, _, reason, _ in found] == [
        ("cup rug", ""),
        ("", "2 columns instead of 3"),
    ]


def test_a_row_without_a_customer_and_an_endless_session_are_bad(tmp_path: Path) -> None:
    many = "".join(f"u2 item{number:05} de\n" for number in range(30_000))
    place = table(tmp_path / "a.tsv", f"u1 cup de\n{many}u3 rug de\n")
    place.write_text(place.read_text() + "\tlamp\tde\n\tlamp\tde\n", encoding="utf-8")
    found = [(text, reason.partition("than")[0]) for text, _, reason, _ in read(place, format="tsv")]
    assert found == [
        ("cup", ""),
        ("", "a session of more "),
        ("rug", ""),
        ("", "no session"),
        ("", "no session"),
    ]


def test_the_language_of_a_session_is_that_of_its_first_row(tmp_path: Path) -> None:
    place = table(tmp_path / "a.tsv", "u1 cup de\nu1 lamp jp\n")
    source = Source(uri=str(place), text="item", format="tsv", session="user", language="column:market")
    assert [one.language for one in found_in(source)] == ["de"]


def test_json_events_are_a_session(tmp_path: Path) -> None:
    place = tmp_path / "a.jsonl"
    place.write_text(
        '{"events": [{"id": "a cup"}, {"id": 17}]}\n{"events": [{"name": "rug"}]}\n{"events": []}\n'
    )
    source = Source(uri=str(place), text="events.*.id", language="de", last_is_pair=True)
    found = found_in(source)
    assert [(one.text, one.pair, one.reason) for one in found] == [
        ("acup", "17", ""),
        ("", "", "no key 'id'"),
        ("", "", "empty"),
    ]


def test_the_words_of_a_query_stand_before_the_items(tmp_path: Path) -> None:
    place = tmp_path / "a.jsonl"
    place.write_text(
        '{"q": "Rote rote, Schuhe", "events": [{"id": "cup"}, {"id": "rug"}]}\n'
        '{"q": null, "events": [{"id": "cup"}, {"id": "rug"}]}\n'
        '{"q": "水壶", "events": [{"id": "cup"}]}\n'
        '{"q": "", "events": [{"id": "cup"}]}\n'
    )
    source = Source(uri=str(place), text="events.*.id", query="q", language="de", last_is_pair=True)
    found = found_in(source)
    assert [(one.text, one.pair, one.reason) for one in found] == [
        ("query:rote query:schuhe cup", "rug", ""),
        ("cup", "rug", ""),
        ("query:水 query:壶", "cup", ""),
        ("", "", "a session of one item"),
    ]


def test_other_lists_of_keys_keep_their_white_space(tmp_path: Path) -> None:
    place = tmp_path / "a.jsonl"
    place.write_text(
        '{"text": "shoe", "pair": "red shoe", "others": [{"t": "blue hat"}, {"t": "green hat"}]}\n'
    )
    source = Source(uri=str(place), pair="pair", negatives="others.*.t", language="en")
    (one,) = found_in(source)
    assert one.pair.split(SEPARATOR) == ["red shoe", "blue hat", "green hat"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"format": "jsonl"}, r"session is for one column of csv and tsv, not for format=jsonl"),
        ({"format": "tsv", "pair": "market", "last_is_pair": True}, "last_is_pair makes the pair itself"),
    ],
)
def test_sessions_of_what_has_none_are_refused(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        read(table(tmp_path / "a.tsv", "u1 cup de\n"), **settings)


def test_the_most_frequent_items_are_tokens() -> None:
    counts = {f"z{number:02}": 100 - number for number in range(90)} | COUNTS
    found = catalogue.of_items(counts, Tokenizer(algorithm="items", vocab_size=64), MARKETS)
    names = found.convert_ids_to_tokens(range(len(found)))
    # Five special ones, two markets, and 57 items; what is spelt as a market's token is none.
    assert names[5:] == ["__de__", "__jp__", *(f"z{number:02}" for number in range(57))]
    assert found.convert_tokens_to_ids("rug") == found.unk_token_id
    assert tokens().convert_ids_to_tokens(range(7, 11)) == ["cup", "kettle", "lamp", "rug"]


def vocabulary() -> tokenizer.Vocabulary:
    return tokenizer.vocabulary(tokens())


def cutter(length: int = 8) -> next_item.Sessions:
    return next_item.sessions(tokenizer.encoder(tokens()), vocabulary(), MARKETS, length)


def window(*texts: str, language: int = 1) -> Window:
    return Window(0, list(texts), [""] * len(texts), [language] * len(texts), list(range(len(texts))))


def test_a_session_begins_with_its_market() -> None:
    (piece,) = cutter()(window("cup cup unheard-of <pad> lamp"))
    start = ids("__jp__")
    assert piece.tokens == [*start, *ids("cup lamp")]
    assert piece.targets == [NONE, *ids("cup lamp")]


def test_a_long_session_begins_anew_in_the_next_row() -> None:
    found = cutter(3)(window("cup lamp cup lamp kettle", "unheard-of"))
    start = ids("__jp__")
    assert [piece.tokens for piece in found] == [
        [*start, *ids("cup lamp")],
        [*start, *ids("cup lamp")],
        [*start, *ids("kettle")],
        start,
    ]


ASKED = {**COUNTS, "query:red": 99, "query:blue": 98}


def test_a_query_is_read_and_never_predicted() -> None:
    known = catalogue.of_items(ASKED, Tokenizer(algorithm="items", vocab_size=64), MARKETS)
    vocabulary = tokenizer.vocabulary(known)
    red, start = known.convert_tokens_to_ids(["query:red", "__jp__"])
    cut = next_item.sessions(tokenizer.encoder(known), vocabulary, MARKETS, 4)
    # Half of what a row holds beside the market is the query's at most, and each row of a long session begins with it.
    (first, second) = cut(window("query:red query:new query:blue cup lamp kettle rug"))
    assert first.tokens == [start, red, *ids("cup lamp")]
    assert first.targets == [NONE, NONE, *ids("cup lamp")]
    assert second.tokens == [start, red, *ids("kettle rug")]
    packed = packing.unpack(packing.pack(window("query:red query:blue cup lamp"), cut, 8, seed=0))
    inputs, _ = next_item.collate(packed, vocabulary, None, "all")
    assert inputs["candidates_M"].tolist() == sorted(ids("cup kettle lamp rug"))
    # However often it is asked, a word takes no item's place.
    many = {f"z{number:02}": 1 for number in range(52)} | ASKED
    small = catalogue.of_items(many, Tokenizer(algorithm="items", vocab_size=64), MARKETS)
    names = small.convert_ids_to_tokens(range(7, len(small)))
    assert names == ["cup", "kettle", "lamp", "rug", *(f"z{number:02}" for number in range(52)), "query:red"]


def test_an_unknown_market_is_refused() -> None:
    with pytest.raises(ConfigError, match="no token for the market 'mx', only for de, jp"):
        next_item.sessions(tokenizer.encoder(tokens()), vocabulary(), ["mx"], 8)


def batch(*texts: str) -> PackedBatch:
    return packing.unpack(packing.pack(window(*texts), cutter(), 8, seed=0))


def frequencies() -> np.ndarray:
    found = np.zeros(len(tokens()))
    found[ids("cup kettle lamp rug")] = [0.5, 0.25, 0.125, 0.125]
    return found


def test_candidates_are_the_right_items_of_the_batch() -> None:
    inputs, places = next_item.collate(batch("cup lamp", "cup"), vocabulary(), frequencies(), "batch")
    known = inputs["candidates_M"].tolist()
    assert known == sorted(ids("cup lamp"))
    assert sorted(known[place] for place in places) == sorted(ids("cup lamp cup"))
    drawn = dict(zip(known, inputs["drawn_M"].tolist(), strict=True))
    # Of three draws: 1 - 0.5^3 and 1 - 0.875^3.
    wanted = {ids("cup")[0]: math.log(0.875), ids("lamp")[0]: math.log(0.330078125)}
    assert drawn == pytest.approx(wanted, rel=1e-6)


def test_all_candidates_are_the_whole_catalogue_and_not_corrected() -> None:
    inputs, _ = next_item.collate(batch("cup lamp"), vocabulary(), frequencies(), "all")
    assert inputs["candidates_M"].tolist() == sorted(ids("cup kettle lamp rug"))
    assert not inputs["drawn_M"].any()


def model(family: str = "llama", seed: int = 0, **sizes: Any) -> recommender.Recommender:
    torch.manual_seed(seed)
    common = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 24, "dropout": 0.0}
    config = Model.model_validate({"family": family, "max_positions": 16, **common, **sizes})
    return recommender.build(config, tokens()).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_are_those_of_the_language_model_less_what_is_drawn(family: str) -> None:
    network = model(family)
    inputs, _ = next_item.collate(batch("cup lamp kettle", "rug lamp"), vocabulary(), frequencies(), "batch")
    found = network(**inputs)
    rows, columns = np.divmod(inputs["predicted_N"].numpy(), 8)
    whole = inputs["tokens_BT"]
    for place, (row, column) in enumerate(zip(rows, columns, strict=True)):
        first = int(inputs["offsets_BT"][row, column])
        alone = whole[row, column - first : column + 1][None]
        logits = network.model(alone).logits[0, -1]
        wanted = logits[inputs["candidates_M"]] - inputs["drawn_M"]
        torch.testing.assert_close(found[place], wanted, atol=1e-5, rtol=0)


def test_corrected_scores_are_those_of_the_whole_catalogue() -> None:
    """What is always followed by one of two items, drawn 4 to 1, gets their true odds from the sampled softmax."""
    draw = np.random.default_rng(0)
    often = np.zeros(len(tokens()))
    often[ids("cup lamp rug")] = [0.1, 0.4, 0.5]
    learnt = Task(
        Objective(name="next_item"),
        vocabulary(),
        MARKETS,
        0,
        recommendation=Recommendation(),
        frequencies_V=often,
    )
    network = model()
    config = Train(steps=400, lr=1e-2, warmup_steps=5, global_batch_size=4, precision="fp32", zero_stage=0)

    def stream() -> Any:
        while True:
            texts = [f"rug {'lamp' if draw.random() < 0.8 else 'cup'}" for _ in range(16)]
            rows = packing.pack(window(*texts), cutter(), 3, seed=0)
            yield packing.unpack(rows)

    engine = Engine(network, config, 1, over_batch=False)
    for _ in loop.steps(engine, stream(), learnt, config, start=0, seed=0):
        pass
    network.eval()
    inputs, _ = next_item.collate(batch("rug cup"), vocabulary(), often, "all")
    after_rug = network(**inputs)[-1].double().softmax(-1)
    share = dict(zip(inputs["candidates_M"].tolist(), after_rug.tolist(), strict=True))
    odds = share[ids("lamp")[0]] / share[ids("cup")[0]]
    assert 3.0 < odds < 5.4  # 4 to 1


def exported(folder: Path) -> NextItem:
    network = model()
    backbone.export(network, tokens(), dict(network.named_parameters()), folder)
    config = configuration.build(
        {
            "objective": {"name": "next_item"},
            "tokenizer": {"algorithm": "items"},
            "model": {"family": "llama", "path": str(folder)},
            "corpus": {"sequence_length": 8},
        }
    )
    return NextItem(config, folder)


def test_a_saved_recommender_scores_as_the_trained_one(tmp_path: Path) -> None:
    network, opened = model(), exported(tmp_path)
    found = opened.scores(["cup lamp", "unheard-of", " ".join(["rug", "cup"] * 10)], ["jp", "de", "jp"])
    assert found.shape == (3, len(tokens()))
    kept = [*ids("__jp__"), *ids(" ".join(["rug", "cup"] * 10))[-7:]]
    for place, tokens_T in ((0, ids("__jp__ cup lamp")), (1, ids("__de__")), (2, kept)):
        logits = network.model(torch.tensor([tokens_T])).logits[0, -1]
        np.testing.assert_allclose(found[place], logits.detach().numpy(), atol=1e-5)
    assert opened.markets == MARKETS
    assert opened.items == {name: ids(name)[0] for name in ("cup", "kettle", "lamp", "rug")}


def vectors(folder: Path) -> Path:
    """Texts of two products in two languages, and of one that is in no session."""
    place = folder / "vectors.parquet"
    rows = pa.array([1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 3.0, 4.0], pa.float32())
    names = ["cup", "cup", "lamp", "vase"]
    pq.write_table(pa.table({"id": names, "vector": pa.FixedSizeListArray.from_arrays(rows, 2)}), place)
    return place


def test_vectors_of_an_item_are_their_mean_and_unit(tmp_path: Path) -> None:
    found = item_vectors.read(str(vectors(tmp_path)), SETTINGS)
    assert {name: row.tolist() for name, row in found.items()} == {
        "cup": pytest.approx([0.5**0.5, 0.5**0.5]),
        "lamp": [-1.0, 0.0],
        "vase": pytest.approx([0.6, 0.8]),
    }
    laid = item_vectors.table(found, tokens())
    assert laid.shape == (len(tokens()), 2)
    assert not laid[ids("rug")].any()  # nobody wrote of it


def test_a_file_of_no_vectors_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "other.parquet"
    pq.write_table(pa.table({"id": ["cup"]}), place)
    with pytest.raises(ConfigError, match=r"is no file of jobs/embed\.py"):
        item_vectors.read(str(place), SETTINGS)


def test_what_is_made_of_texts_is_kept_in_the_embeddings(tmp_path: Path) -> None:
    laid = item_vectors.table(item_vectors.read(str(vectors(tmp_path)), SETTINGS), tokens())
    torch.manual_seed(1)
    config = Model(
        family="gpt2", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_positions=16
    )
    network = recommender.build(config, tokens(), vectors_VW=laid).eval()
    inputs, _ = next_item.collate(batch("cup lamp rug", "rug lamp"), vocabulary(), frequencies(), "batch")
    wanted = network(**inputs).detach()
    network(**inputs).sum().backward()
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    assert gradients["_projection.weight"].any()  # it is learnt
    trained = {name: one.detach().clone() for name, one in network.named_parameters()}
    recommender.export(network, tokens(), trained, tmp_path)
    opened = recommender.build(config.model_copy(update={"path": str(tmp_path)}), tokens(), tmp_path).eval()
    torch.testing.assert_close(opened(**inputs), wanted, atol=1e-5, rtol=0)
    near = opened.model.get_input_embeddings().weight
    torch.testing.assert_close(near[ids("lamp")[0]], -network._projection.weight[:, 0], atol=1e-6, rtol=0)


class Fixed:
    """Scores by a table, whatever the session."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.items = {name: number for number, name in enumerate(scores)}
        self._row = np.array(list(scores.values()), np.float32)

    def scores(self, sessions: list[str], markets: list[str]) -> np.ndarray:  # noqa: ARG002
        return np.tile(self._row, (len(sessions), 1))


def test_a_market_is_ranked_without_what_the_session_has() -> None:
    group = [Case("a b", "c", "f", 0), Case("c", "d", "f", 1), Case("d", "z", "f", 2)]
    market = recommendation.Market.of(group)
    fixed: Any = Fixed({"a": 1.0, "b": 2.0, "c": 3.0, "d": 3.0})
    (found,) = recommendation.rank(fixed, group, market, "de", negatives=0)
    # Equals: the right one is behind; z, which the model does not know, is behind all.
    assert found == ["d c z", "d b a z", "c b a z"]
    figures = market.figures(resamples=10)
    assert figures["R@10"].value == 100.0
    assert figures["MRR"].value == pytest.approx(100 * (1 / 2 + 1 + 1 / 4) / 3)
    assert figures["coverage@10"].value == 100.0


def test_negatives_depend_on_the_session_alone() -> None:
    group = [
        Case("i1 i2", "i3", "f", 0, "u1"),
        *(Case(f"i{n}", f"i{n + 1}", "f", n, f"u{n}") for n in range(4, 90)),
    ]
    market = recommendation.Market.of(group)
    drawn = market.candidates(group[0], 20)
    again = recommendation.Market.of(group[::-1]).candidates(group[0], 20)
    assert drawn.tolist() == again.tolist()
    assert market.names[drawn[0]] == "i3"
    assert len(set(drawn.tolist())) == 21
    assert not {"i1", "i2"} & {market.names[place] for place in drawn}
    assert drawn.tolist() != market.candidates(group[1], 20).tolist()


def test_next_item_and_its_tokenizer_go_together() -> None:
    with pytest.raises(ConfigError, match=r"next_item and tokenizer\.algorithm=items"):
        configuration.build({"objective": {"name": "next_item"}, "model": {"family": "gpt2"}})
    with pytest.raises(ConfigError, match="go together"):
        configuration.build({"tokenizer": {"algorithm": "items"}})


def test_a_test_set_of_an_unknown_market_is_refused(tmp_path: Path) -> None:
    place = table(tmp_path / "mx.tsv", "u1 cup de\nu1 lamp de\n")
    folder = tmp_path / "model"
    folder.mkdir()
    exported(folder)
    config = configuration.build(
        {
            "objective": {"name": "next_item"},
            "tokenizer": {"algorithm": "items"},
            "model": {"family": "llama", "path": str(folder)},
            "evaluation": {
                "sources": [
                    {
                        "uri": str(place),
                        "format": "tsv",
                        "text": "item",
                        "session": "user",
                        "last_is_pair": True,
                    }
                ]
            },
        }
    )
    with pytest.raises(ConfigError, match="no token for the market 'mx'"):
        evaluate.evaluate(config)


def test_every_market_has_both_tables(tmp_path: Path) -> None:
    for name, rows in (("de", "u1 cup x\nu1 lamp x\nu2 rug x\nu2 cup x\n"), ("jp", "u1 lamp x\nu1 rug x\n")):
        table(tmp_path / f"{name}.tsv", rows)
    folder = tmp_path / "model"
    folder.mkdir()
    exported(folder)
    source = {"uri": str(tmp_path), "files": "*.tsv", "format": "tsv", "text": "item", "session": "user"}
    config = configuration.build(
        {
            "objective": {"name": "next_item"},
            "tokenizer": {"algorithm": "items"},
            "model": {"family": "llama", "path": str(folder)},
            "evaluation": {"sources": [{**source, "last_is_pair": True}], "resamples": 10, "negatives": 1},
        }
    )
    report, predictions = evaluate.evaluate(config, show_progress=False)
    assert {task: sorted(table) for task, table in report.cells.items()} == {
        "recommendation 1": MARKETS,
        "catalogue": MARKETS,
    }
    assert report.cells["recommendation 1"]["de"]["nDCG@10"].n == 2
    assert sorted(predictions[0]["prediction"].split()) == ["lamp", "rug"]
