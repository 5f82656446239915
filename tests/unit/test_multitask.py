"""Several heads in one run: each task sees its own labels, weights its own losses, and learns beside the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlray.config import ConfigError, Objective, RunConfig
from mlray.corpus import packing
from mlray.corpus.windows import Window
from mlray.evaluation import evaluate
from mlray.models import backbone, tokenizer
from mlray.objectives import labels, multitask
from mlray.objectives.table import OBJECTIVES, Task
from mlray.training import loop
from mlray.training.engine import Engine
from tests.unit import test_labels, tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

NAMES = ["mood:en", "ner:de"]
LABELS = ["mood:bad", "mood:good", "ner:B-LOC", "ner:O"]
CONFIG = Objective.model_validate(
    {
        "name": "multitask",
        "tasks": [
            {"name": "ner", "objective": "tagging", "weight": 2.0},
            {"name": "mood", "objective": "classification"},
        ],
    }
)
LENGTH = 32


def task() -> Task:
    return Task(CONFIG, tokenizer.vocabulary(tiny.tokens()), NAMES, 0, LABELS)


def window(number: int = 0, documents: int = 60) -> Window:
    """Texts are good where they speak of water, words are places where they are `Alltag`."""
    german = tiny.texts("de", documents, seed=number)
    english = tiny.texts("en", documents, seed=number)
    tags = [" ".join("B-LOC" if word == "Alltag" else "O" for word in text.split()) for text in german]
    moods = ["good" if "water" in text.split() else "bad" for text in english]
    texts = [text for both in zip(english, german, strict=True) for text in both]
    pairs = [pair for both in zip(moods, tags, strict=True) for pair in both]
    return Window(number, texts, pairs, [0, 1] * documents, list(range(2 * documents)))


def test_each_document_is_cut_as_its_task_does() -> None:
    encoder = test_labels.encoder()
    found = task().cutter(encoder, LENGTH)(window(documents=3))
    words = labels.Words(encoder, {"B-LOC": 2, "O": 3}, LENGTH)
    texts = labels.Texts(encoder, {"bad": 0, "good": 1}, LENGTH)
    whole = window(documents=3)

    def alone(cutter: packing.Cutter, own: range) -> list[packing.Piece]:
        lists = [
            [values[i] for i in own] for values in (whole.text, whole.pair, whole.language, whole.document)
        ]
        return cutter(Window(0, *lists))

    wanted = alone(texts, range(0, 6, 2)) + alone(words, range(1, 6, 2))
    assert sorted(found, key=lambda piece: piece.document) == sorted(wanted, key=lambda piece: piece.document)


def test_a_position_chooses_among_the_labels_of_its_task() -> None:
    allowed = multitask.allowed(np.array([3, 0]), LABELS)
    assert allowed.tolist() == [[False, False, True, True], [True, True, False, False]]


def test_the_loss_is_that_of_separate_heads_with_their_weights() -> None:
    torch.manual_seed(0)
    logits_NK, targets_N = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 3])
    masked = logits_NK.masked_fill(~multitask.allowed(targets_N.numpy(), LABELS), -torch.inf)
    found = OBJECTIVES["multitask"].loss(masked, targets_N, task())
    mood, ner = targets_N < 2, targets_N >= 2
    cross_entropy = torch.nn.functional.cross_entropy
    apart = cross_entropy(logits_NK[mood, :2], targets_N[mood], reduction="sum")
    apart = apart + 2.0 * cross_entropy(logits_NK[ner, 2:], targets_N[ner] - 2, reduction="sum")
    assert float(found) == pytest.approx(float(apart), rel=1e-6)


def test_the_weights_of_the_labels_are_made_once_for_a_run() -> None:
    one = task()
    assert one.label_weights.tolist() == [1.0, 1.0, 2.0, 2.0]
    assert one.label_weights is one.label_weights


def test_labels_are_named_after_their_task_and_strangers_are_refused() -> None:
    labels_of = OBJECTIVES["multitask"].labels_of
    assert labels_of is not None
    assert list(labels_of("im Alltag", "O B-LOC", "ner:de", CONFIG)) == ["ner:O", "ner:B-LOC"]
    assert list(labels_of("a b c", "very good", "mood:en", CONFIG)) == ["mood:very good"]
    for name in ("de", "slots:de"):
        with pytest.raises(ConfigError, match=f"the rows of '{name}' belong to no task of the run"):
            labels_of("a", "O", name, CONFIG)


def test_both_heads_learn_in_one_run_and_are_judged_in_one(tmp_path: Path) -> None:
    encoder = test_labels.encoder()
    table = packing.pack(window(), task().cutter(encoder, LENGTH), LENGTH, 0)
    model = test_labels.model("words", LABELS)
    config = tiny.train(steps=60, lr=1e-2)
    batches = tiny.deal(table, 8) * 30
    engine = Engine(model, config, 1)
    losses = [step.loss for step in loop.steps(engine, batches, task(), config, start=0, seed=0)]
    seen = window()
    parts = [
        Window(0, seen.text[n::2], seen.pair[n::2], [n] * 60, list(range(60))) for n in range(2)
    ]  # as held-out rows are packed: each row in one language
    cutter = task().cutter(encoder, LENGTH)
    apart = pa.concat_tables(packing.pack(part, cutter, LENGTH, 0) for part in parts)
    last = loop.validate(engine, tiny.deal(apart, 8), task())
    assert losses[-1] < 0.3 * losses[0]
    assert last["macro"]["accuracy"] > 0.9

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    backbone.export(model, tiny.tokens(), weights, tmp_path / "weights")
    for name, number in (("mood", 0), ("ner", 1)):
        rows = [
            {"text": text, "label": pair}
            for text, pair in zip(seen.text[number::2], seen.pair[number::2], strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    asked = RunConfig.model_validate({
        "objective": CONFIG.model_dump(),
        "model": {"family": "bert", "path": str(tmp_path / "weights")},
        "corpus": {"sequence_length": LENGTH},
        "evaluation": {"resamples": 10, "sources": [
            {"uri": str(tmp_path / "mood.jsonl"), "pair": "label", "language": "en", "task": "mood"},
            {"uri": str(tmp_path / "ner.jsonl"), "pair": "label", "language": "de", "task": "ner"},
        ]},
    })  # fmt: skip
    report, predictions = evaluate.evaluate(asked, show_progress=False)
    assert {task: list(cells) for task, cells in report.cells.items()} == {
        "classification mood": ["en"],
        "tagging ner": ["de"],
    }
    moods = [line for line in predictions if line["task"] == "classification mood"]
    right = np.mean([line["prediction"] == line["label"] for line in moods])
    assert report.cells["classification mood"]["en"]["accuracy"].value == pytest.approx(100 * right)
    assert right == pytest.approx(last["mood:en"]["accuracy"])  # as the training measures it
    assert report.cells["tagging ner"]["de"]["span F1"].value > 80
    lengths = [len(ids) for ids in encoder.encode(seen.text[0::2])]
    assert report.about["cut_off"] == {"mood:en": sum(length > LENGTH - 2 for length in lengths)}
    assert 0 < report.about["cut_off"]["mood:en"] < 60
