"""Pairs in the corpus: hard negatives, twice the same text, halves that decide on a part, batches of one language."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlray import configuration
from mlray.config import ConfigError, Corpus, RunConfig, Source, Storage
from mlray.corpus import curriculum, fields, packing, records, sources, testsets
from mlray.corpus.fields import Record
from mlray.corpus.lines import Chunk
from mlray.corpus.windows import Window
from mlray.models import tokenizer
from mlray.objectives import checks
from mlray.objectives.pairing import Pairs
from mlray.schema import SEPARATOR
from tests.unit import tiny

SETTINGS = Storage()


def read(path: Path, changes: dict[str, Any] | None = None, **wanted: Any) -> list[Record]:
    """All records of a file."""
    source = Source.model_validate({"uri": str(path), "language": "de-en", **wanted})
    (file,) = sources.list_files((source,), SETTINGS)
    file = dataclasses.replace(file, **(changes or {}))
    return [record for batch in records.read(Chunk(file, 0, file.size), 1000, SETTINGS) for record in batch]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_hard_negatives_stand_behind_the_pair(tmp_path: Path) -> None:
    rows = [
        {"q": "a", "p": "A", "n": ["x", "y"]},
        {"q": "b", "p": "B", "n": []},
        {"q": "c", "p": "C", "n": "z\nw"},
        {"q": "d", "p": "D", "n": [3]},
        {"q": "e", "p": "E", "n": None},
    ]
    found = read(jsonl(tmp_path / "a.jsonl", rows), text="q", pair="p", negatives="n")
    assert [record.pair.split(SEPARATOR) for record in found[:3]] == [["A", "x", "y"], ["B"], ["C", "z", "w"]]
    assert [record.reason for record in found] == ["", "", "", "not text but int", ""]


def test_a_text_twice_is_refused_where_the_objective_learns_nothing_from_it(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a", "p": "a"}, {"text": "b", "p": "B"}])
    assert [record.reason for record in read(path, pair="p")] == ["", ""]
    found = read(path, {"distinct": True}, pair="p")
    assert [record.reason for record in found] == ["the same text on both sides", ""]


def test_the_second_half_of_a_line_can_decide_on_its_part(tmp_path: Path) -> None:
    path = tmp_path / "de-en.tsv"
    path.write_text("".join(f"Satz {i}\tsentence {i % 40}\n" for i in range(400)), encoding="utf-8")
    common = {"format": "text", "pair": "translation", "part_by": "pair"}
    test = read(path, part=(0.0, 0.3), **common)
    train = read(path, part=(0.3, 1.0), **common)
    assert len(test) + len(train) == 400
    assert {record.pair for record in test}.isdisjoint(record.pair for record in train)
    assert all(fields.share_of(record.pair) < 0.3 for record in test)
    with pytest.raises(ConfigError, match="part_by=pair needs"):
        read(path, format="text", part_by="pair")


def test_rows_with_a_text_of_the_test_set_are_refused_by_name(tmp_path: Path) -> None:
    rows = [
        {"text": "Der Kessel kocht.", "p": "The kettle boils."},
        {"text": "Es ist warm", "p": "THE KETTLE, BOILS"},
        {"text": "der kessel kocht", "p": "Water is ready"},
        {"text": "Es ist kalt", "p": "It is cold"},
    ]
    place = records.forbid(["the kettle boils!", "Der Kessel kocht."], str(tmp_path), SETTINGS)
    found = read(jsonl(tmp_path / "a.jsonl", rows), {"without": place}, pair="p")
    assert [record.reason for record in found] == [*["stands in a test set"] * 3, ""]
    assert not found[0].text
    assert records.forbid(["Der Kessel kocht.", "the kettle boils!"], str(tmp_path), SETTINGS) == place
    labels = read(jsonl(tmp_path / "a.jsonl", rows), {"without": place, "labelled": True}, pair="p")
    assert [record.text for record in labels if not record.reason] == ["Es ist warm", "Es ist kalt"]


def test_a_label_of_the_test_set_may_stand_in_training(tmp_path: Path) -> None:
    train = [("where is it", "delivery"), ("delivery", "other"), ("Too small!", "return")]
    test = [("when does it come", "delivery"), ("too small", "return")]
    for name, rows in (("train", train), ("test", test)):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": text, "label": label} for text, label in rows])
    source = {"uri": str(tmp_path / "train.jsonl"), "pair": "label", "language": "en"}
    config = RunConfig.model_validate(
        {
            "run": {"storage_uri": str(tmp_path / "runs")},
            "objective": {"name": "classification"},
            "corpus": {"sources": [source], "without_tests": True},
            "evaluation": {"sources": [{**source, "uri": str(tmp_path / "test.jsonl")}]},
        }
    )
    (file,) = checks.guarded(
        sources.list_files(config.corpus.sources, SETTINGS), config, str(tmp_path / "corpus")
    )
    (found,) = records.read(Chunk(file, 0, file.size), 1000, SETTINGS)
    assert [record.reason for record in found] == ["", "", "stands in a test set"]


def test_hard_negatives_of_a_test_set_are_no_part_of_the_right_answer(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "where", "p": "here", "n": ["there", "nowhere"]}])
    source = {"uri": str(path), "pair": "p", "negatives": "n", "language": "en"}
    found, _ = testsets.read(RunConfig.model_validate({"evaluation": {"sources": [source]}}))
    assert [(case.text, case.pair) for case in found["en"]] == [("where", "here")]


def test_a_test_set_can_be_cut_to_the_rows_with_the_smallest_hashes(tmp_path: Path) -> None:
    rows = [{"text": f"Satz {i}", "p": f"sentence {i}", "id": i % 50} for i in range(200)]
    source = {
        "uri": str(jsonl(tmp_path / "a.jsonl", rows)),
        "pair": "p",
        "language": "de-en",
        "part_by": "id",
    }
    config = RunConfig.model_validate({"evaluation": {"sources": [source], "max_rows": 20}})
    found, _ = testsets.read(config)
    chosen = sorted({str(row["id"]) for row in rows}, key=fields.share_of)[:5]
    assert sorted({case.key for case in found["de-en"]}) == sorted(chosen)
    assert len(found["de-en"]) == 20


def window(counts: list[int]) -> Window:
    languages = [language for language, count in enumerate(counts) for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(languages))
    texts = [f"warm kettle {i}" for i in order]
    groups = [languages[i] for i in order]
    sources = [group // 2 for group in groups]
    return Window(4, texts, ["leise"] * len(texts), groups, order.tolist(), source=sources)


def test_batches_of_one_source_are_of_all_its_languages() -> None:
    cutter = Pairs(tokenizer.encoder(tiny.tokens()), 64)
    made = window([20, 12, 16])  # the first two languages are of one source
    corpus = Corpus(sequence_length=64, batches="source")
    packed = curriculum.pack(made, cutter, corpus, 0, batch_rows=16)
    languages = [own[0] for own in packed.column("languages").to_pylist()]
    batches = [set(languages[start : start + 16]) for start in range(0, 48, 16)]
    assert sorted(map(sorted, batches)) == [[0, 1], [0, 1], [2]]
    documents = {document for own in packed.column("documents").to_pylist() for document in own}
    unsorted = curriculum.pack(made, cutter, Corpus(sequence_length=64), 0)
    assert documents == {document for own in unsorted.column("documents").to_pylist() for document in own}


def test_batches_of_one_language_hold_each_pair_once() -> None:
    cutter = Pairs(tokenizer.encoder(tiny.tokens()), 64)
    made = window([23, 9, 16])
    mixed, sorted_ = (
        curriculum.pack(made, cutter, Corpus(sequence_length=64, batches=batches), 0, batch_rows=8)
        for batches in ("mixed", "language")
    )
    assert sorted_.column("row").to_pylist() == list(range(48))
    assert sorted(map(str, mixed.column("documents").to_pylist())) == sorted(
        map(str, sorted_.column("documents").to_pylist())
    )
    languages = [own[0] for own in sorted_.column("languages").to_pylist()]
    batches = [set(languages[start : start + 8]) for start in range(0, 48, 8)]
    assert [len(batch) for batch in batches[:5]] == [1, 1, 1, 1, 1]
    assert sorted(batch.pop() for batch in batches[:5]) == [0, 0, 1, 2, 2]
    assert len(batches[5]) == 2  # 7 of the first and 1 of the second are left
    assert curriculum.pack(made, cutter, Corpus(sequence_length=64, batches="language"), 0, 8).equals(sorted_)
    assert packing.unpack(sorted_).next_position.row == 48


def test_the_settings_of_pairs_have_a_place() -> None:
    config = configuration.load(None, ["objective.name=contrastive", "contrastive.temperature=0.1"])
    assert config.contrastive.temperature == 0.1
    with pytest.raises(ConfigError, match="temperature"):
        configuration.load(None, ["contrastive.temperatur=0.1"])
