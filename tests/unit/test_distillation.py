"""Distillation: what student and teacher read, the losses by hand, and a student that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlray.config import ConfigError, Contrastive, Distillation, Model, Objective
from mlray.corpus import packing
from mlray.corpus.windows import Window
from mlray.models import embedder, tokenizer
from mlray.objectives import distillation
from mlray.objectives.table import Task
from mlray.training import loop
from mlray.training.engine import Engine
from tests.unit import tiny

pytestmark = tiny.DEEPSPEED_WARNINGS
LENGTH = 60
NAMES = ["de-en", "en-de"]


def encoder() -> tokenizer.Encoder:
    return tokenizer.encoder(tiny.tokens())


def cut() -> distillation.Halves:
    return distillation.halves(encoder(), encoder(), NAMES, Distillation(language="en"), LENGTH)


def student(width: int = 16, dropout: float = 0.0) -> Model:
    sizes = {"hidden_size": width, "num_layers": 1, "num_heads": 2, "intermediate_size": 24}
    return Model.model_validate({"family": "bert", "max_positions": 64, "dropout": dropout, **sizes})


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    network = embedder.build(student(), Contrastive(pooling="cls"), tiny.tokens(), None)
    embedder.export(network, tiny.tokens(), dict(network.named_parameters()), tmp_path / "teacher")
    return tmp_path / "teacher"


def table(count: int, number: int = 0) -> Any:
    left, right = tiny.texts("de", count, seed=number), tiny.texts("en", count, seed=number)
    halves = [(a, b) if i % 2 == 0 else (b, a) for i, (a, b) in enumerate(zip(left, right, strict=True))]
    texts, pairs = (list(side) for side in zip(*halves, strict=True))
    window = Window(number, texts, pairs, [i % 2 for i in range(count)], list(range(count)))
    return packing.pack(window, cut(), LENGTH, seed=0)


def test_the_teacher_reads_the_half_in_its_language() -> None:
    window = Window(0, ["der Wasserkocher", "the kettle"], ["the kettle", "leise"], [0, 1], [0, 1])
    for piece in cut()(window):
        lengths = np.cumsum([length for length, _ in piece.texts])
        *_, known = np.split(np.array(piece.tokens), lengths[:-1])
        assert known.tolist() == [encoder().start_id, *encoder().encode(["the kettle"])[0], encoder().end_id]
    with pytest.raises(ConfigError, match=r"the pairs 'de-fr' have no half in distillation\.language=en"):
        distillation.halves(encoder(), encoder(), ["de-fr"], Distillation(), LENGTH)


def test_the_losses_are_those_by_hand() -> None:
    unit = [[1.0, 0.0], [0.0, 1.0]]
    turned = [[0.6, 0.8], [0.0, 1.0]]
    vectors = torch.tensor([unit, turned, unit])
    # Of the first pair only the second half is away from the teacher: (0.4^2 + 0.8^2) / 2.
    assert float(distillation.loss(vectors, Distillation())) == pytest.approx(0.4)
    # Its similarities are [[1, .8], [.8, 1]] instead of the unit matrix: 2 * mean(0, .64) / 2.
    assert float(distillation.loss(vectors, Distillation(loss="similarity"))) == pytest.approx(0.32)
    losses, right = distillation.scores(vectors, Distillation())
    assert losses.tolist() == pytest.approx([0.4, 0.0])
    assert right.tolist() == [True, True]
    # Of the first halves [1, 0] and [0, 1] the first is nearer to [0.8, 0.6], the second to [0.6, 0.8].
    crossed = torch.tensor([unit, [[0.6, 0.8], [0.8, 0.6]], unit])
    assert distillation.scores(crossed, Distillation())[1].tolist() == [False, False]


def test_a_teacher_of_another_size_is_refused_unless_only_similarities_count(teacher: Path) -> None:
    place = str(teacher)
    build = embedder.build_distiller
    with pytest.raises(ConfigError, match="makes vectors of 16 dimensions and the student of 32"):
        build(student(32), Contrastive(), Distillation(teacher=place), tiny.tokens(), None, teacher)
    wide = Distillation(teacher=place, loss="similarity")
    network = build(student(32), Contrastive(), wide, tiny.tokens(), None, teacher)
    inputs = task().inputs(packing.unpack(table(6)))
    found = network.eval()(**inputs.model)
    assert found.shape == (3, 6, 32)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3, 6), atol=1e-6)
    assert not found[2, :, 16:].any()
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        build(student(), Contrastive(), wide, tiny.tokens(), None, teacher.parent)


def task() -> Task:
    vocabulary = tokenizer.vocabulary(tiny.tokens())
    return Task(Objective(name="distillation"), vocabulary, NAMES, 0, teacher=encoder())


def test_a_student_learns_and_its_teacher_stays(teacher: Path) -> None:
    torch.manual_seed(0)
    network = embedder.build_distiller(
        student(), Contrastive(), Distillation(teacher=str(teacher)), tiny.tokens(), None, teacher
    )
    known = network.teacher
    assert known.pooling == "cls"
    before = {name: tensor.clone() for name, tensor in known.named_parameters()}
    assert not any("teacher" in name for name, _ in network.named_parameters())
    config = tiny.train(steps=60, lr=1e-2, micro_batch_size=8)
    batches = [batch for number in range(30) for batch in tiny.deal(table(16, number), 8)]
    engine = Engine(network, config, 1)
    losses = [step.loss for step in loop.steps(engine, batches, task(), config, start=0, seed=0)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in known.named_parameters())
    scores = loop.validate(engine, batches[-2:], task())
    assert 0 < scores["de-en"]["loss"] < losses[0]
