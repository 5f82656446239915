"""The plan's figures, by hand."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mlray import configuration
from mlray.config import ConfigError
from mlray.corpus.lines import Chunk
from mlray.corpus.manifest import ChunkEntry, Manifest, Part
from mlray.corpus.sources import SourceFile
from mlray.objectives.checks import check_positions
from mlray.training import plan
from tests.unit import tiny

FERTILITY = {"de": {"tokens_per_char": 0.5}, "fr": {"tokens_per_char": 0.25}}
SIZES = ["corpus.alpha=1", "corpus.sequence_length=32", "train.micro_batch_size=2", "train.precision=fp32"]


def manifest() -> Manifest:
    """30 German documents of 20 characters in two files, 10 French ones of 40 in one."""
    parts = [("a", Part("de", 20, 400, ())), ("b", Part("de", 10, 200, ())), ("b", Part("fr", 10, 400, ()))]
    files = {uri: SourceFile(uri, 1, "", "jsonl", None, ("text",), None, None, "language") for uri in "ab"}
    return Manifest(tuple(ChunkEntry(Chunk(files[uri]), (part,)) for uri, part in parts), (), (), "")


def outline(*overrides: str) -> plan.Plan:
    config = configuration.load(None, [*SIZES, "train.steps=10", "train.global_batch_size=4", *overrides])
    return plan.make(config, manifest(), FERTILITY, tiny.encoder())


def test_languages_by_hand() -> None:
    found = outline()
    assert found.files == {"de": 2, "fr": 1}
    assert found.documents == {"de": 30, "fr": 10}
    assert found.tokens == {
        "de": 600 * 0.5 + 2 * 30,
        "fr": 400 * 0.25 + 2 * 10,
    }  # 12 tokens a document in both
    assert found.share == {"de": 0.75, "fr": 0.25}
    assert found.tokens_per_step == 4 * 32
    documents_seen = 10 * 4 * 32 / 12
    assert found.epochs == pytest.approx({"de": 0.75 * documents_seen / 30, "fr": 0.25 * documents_seen / 10})


def test_memory_follows_the_model_that_is_loaded_and_the_stage() -> None:
    alone, shared = outline(), outline("cluster.num_workers=2", "train.zero_stage=3")
    parameters = sum(parameter.numel() for parameter in tiny.encoder().parameters())
    assert alone.parameters == parameters
    assert alone.memory_bytes["weights"] == 4 * parameters  # one fp32 worker: no ZeRO, no second copy
    assert alone.memory_bytes["optimiser"] == 8 * parameters
    assert shared.memory_bytes["weights"] == 2 * parameters
    assert shared.memory_bytes["optimiser"] == 6 * parameters
    # 64 tokens x 2 layers x (16 x 16 hidden + 2 x 24 inner + 3 x 2 heads x 32) x 4 bytes: tiny.encoder's sizes
    assert alone.memory_bytes["activations"] == 64 * 2 * (256 + 48 + 192) * 4
    host = outline("train.offload=true", "train.zero_stage=2").memory_bytes
    assert host["optimiser (on the host)"] == 12 * parameters


def test_show_names_every_language_also_one_of_which_all_was_refused() -> None:
    console = Console(file=io.StringIO(), width=110)
    plan.show(outline(), {"de": {"empty": 2}, "und": {"not JSON": 3, "empty": 4}}, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    cells = {line.split("│")[1].strip(): line for line in lines if line.startswith("│")}
    assert cells["de"].split("│")[-2].strip() == "2"
    assert cells["und"].split("│")[-2].strip() == "7"
    assert "10 steps x 128 tokens" in console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_longer_than_the_positions_are_refused() -> None:
    config = configuration.load(None, ["corpus.sequence_length=65"])
    with pytest.raises(ConfigError, match=r"lower it to 64 or raise model\.max_positions"):
        check_positions(config, 64)
    config = configuration.load(None, ["corpus.sequence_length=195", "objective.name=distillation"])
    with pytest.raises(ConfigError, match=r"longer than the teacher's 64 .*of 3 texts; lower it to 192$"):
        check_positions(config, 64, "teacher")


def test_a_window_that_leaves_files_in_their_order_is_told() -> None:
    outline = plan.Plan({}, {"de": 70, "en": 30}, {}, {}, {}, 1, 1, 1, 1, {})
    for rows, told in ((99, True), (100, False)):
        console = Console(file=io.StringIO(), width=200)
        plan.show_order(outline, rows, console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("corpus.window_rows=100" in text) == told


def test_a_source_that_fills_no_batch_is_named() -> None:
    files = [
        SourceFile(uri, 1, "", "jsonl", None, ("text",), None, None, "language", source=n)
        for n, uri in enumerate("ab")
    ]
    parts = [Part("de", 90, 1800, ()), Part("de", 30, 600, ())]
    made = Manifest(
        tuple(ChunkEntry(Chunk(file), (part,)) for file, part in zip(files, parts, strict=True)), (), (), ""
    )
    sizes = ["corpus.batches=source", "corpus.window_rows=64", "train.micro_batch_size=16"]
    plan.check_batches(configuration.load(None, [*sizes, "train.global_batch_size=16"]), made)
    small = configuration.load(None, [*sizes, "train.global_batch_size=32"])
    with pytest.raises(ConfigError, match=r"^corpus.sources\[1\] has 30 pairs, less than the batch of 32"):
        plan.check_batches(small, made)
    more = Manifest(
        tuple(
            ChunkEntry(Chunk(file), (Part("de", 4 * part.documents, 1, ()),))
            for file, part in zip(files, parts, strict=True)
        ),
        (),
        (),
        "",
    )
    with pytest.raises(ConfigError) as caught:
        plan.check_batches(small, more)
    assert str(caught.value).startswith(
        "corpus.sources[1] gives 16 pairs to a window of 64, less than the batch of 32"
    )
