"""The loop on one process: against plain torch, whatever the accumulation, across a resume, and its validation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mlray.config import Adapter, Objective, RunError, Train
from mlray.corpus import packing, validation
from mlray.corpus.packing import Piece
from mlray.models import adapters
from mlray.objectives import masked
from mlray.schema import Position
from mlray.training import checkpoint, loop
from mlray.training.checkpoint import Progress
from mlray.training.engine import Engine
from tests.unit import tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

SETUPS = [
    (0, False, "fp32"),
    (1, False, "fp32"),
    (2, False, "fp32"),
    (3, False, "fp32"),
    (2, True, "fp32"),
    (3, True, "fp32"),
    (0, False, "bf16"),
    (1, False, "bf16"),
    (2, False, "bf16"),
    (3, False, "bf16"),
]
"""ZeRO stage, offload, precision."""


def moments(engine: Engine) -> torch.Tensor:
    """Adam's first moment of every parameter, in one row: after one step a tenth of the gradient."""
    return torch.cat([tensors["exp_avg"].flatten() for _, tensors in engine.state()])


def plain_adam(batches: list[Any], config: Train) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a loop in plain torch on the same batches."""
    model, task = tiny.encoder(dropout=0.0), tiny.task()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    bare = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": bare, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=config.adam_betas, eps=config.adam_eps)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        inputs = task.inputs(batch)
        loss = torch.nn.functional.cross_entropy(model(**inputs.model), inputs.targets_N)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping)))
        for group in adam.param_groups:
            group["lr"] = loop.learning_rate(config, step)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_equal_plain_torch(stage: int) -> None:
    config = tiny.train(steps=12, zero_stage=stage, gradient_clipping=0.5, weight_decay=0.1)
    batches = tiny.deal(tiny.rows(96), 8)
    steps = tiny.advance(Engine(tiny.encoder(), config, 1), batches, config)
    losses, norms = plain_adam(batches, config)
    assert losses[-1] < losses[0] - 0.3
    assert max(norms) > 0.5  # some gradients are clipped
    assert [step.loss for step in steps] == pytest.approx(losses, abs=1e-5)
    assert [step.gradient_norm for step in steps] == pytest.approx(norms, rel=1e-3)
    assert [step.rate for step in steps] == [loop.learning_rate(config, number) for number in range(12)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_changes_neither_loss_nor_gradient(stage: int) -> None:
    table, losses, gradients = tiny.rows(24), [], []
    for accumulation in (1, 2, 4):
        config = tiny.train(steps=1, micro_batch_size=8 // accumulation, zero_stage=stage)
        engine = Engine(tiny.encoder(), config, accumulation)
        (step,) = tiny.advance(engine, tiny.deal(table, 8 // accumulation), config)
        gradients.append(moments(engine))
        more = tiny.train(steps=3, micro_batch_size=8 // accumulation, zero_stage=stage)
        rest = tiny.advance(engine, tiny.deal(table, 8 // accumulation), more, start=1)
        losses.append([one.loss for one in (step, *rest)])
    counts = [len(tiny.task().inputs(batch).targets_N) for batch in tiny.deal(table, 2)[:4]]
    assert len(set(counts)) > 1  # a mean of the micro-batches' means would be another loss
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-5
    assert float((gradients[2] - gradients[0]).norm() / gradients[0].norm()) < 1e-5


def test_activation_checkpointing_changes_nothing() -> None:
    losses, passes = [], []
    for saving in (False, True):
        config = tiny.train(steps=4, activation_checkpointing=saving)
        model, called = tiny.encoder(dropout=0.1), list[int]()
        first = next(part for name, part in model.named_modules() if name.endswith("layer.0.attention"))
        first.register_forward_hook(lambda *_, called=called: called.append(1))
        engine = Engine(model, config, 1)
        passes.append(called)
        losses.append([step.loss for step in tiny.advance(engine, tiny.deal(tiny.rows(32), 8), config)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert [len(called) for called in passes] == [4, 8]  # its values are computed again for the gradient


def test_a_step_tells_where_the_stream_stands_and_what_it_saw() -> None:
    config = tiny.train(steps=6, micro_batch_size=4)
    table = tiny.rows(48)
    batches = tiny.deal(table, 4)
    steps = tiny.advance(Engine(tiny.encoder(), config, 2), batches, config)
    rows = table.to_pylist()
    for number, step in enumerate(steps):
        seen = rows[8 * number : 8 * number + 8]
        assert step.number == number + 1
        assert step.position == Position(seen[-1]["window"], seen[-1]["row"] + 1)
        tokens, documents = [0, 0], [0, 0]
        for row in seen:
            for language, length in zip(row["languages"], row["lengths"], strict=True):
                tokens[language] += length
                documents[language] += 1
        assert step.tokens.tolist() == tokens
        assert step.documents.tolist() == documents
    assert len({row["window"] for row in rows}) > 1  # the position crossed a window


def test_a_stream_that_ends_early_ends_the_run() -> None:
    config = tiny.train(steps=5, micro_batch_size=4)
    engine = Engine(tiny.encoder(), config, 2)
    found = []
    with pytest.raises(RunError, match="ended before step 4 of 5"):  # noqa: PT012
        for step in loop.steps(engine, tiny.deal(tiny.rows(28), 4), tiny.task(), config, start=0, seed=0):
            found.append(step.number)
    assert found == [1, 2, 3]


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved() -> None:
    config = tiny.train(steps=3)
    encoder = tiny.encoder()
    encoder.model.get_input_embeddings().weight.data[7] = float("nan")
    with pytest.raises(RunError, match=r"^step 1 has a loss of nan .* lower train\.lr"):
        tiny.advance(Engine(encoder, config, 1), tiny.deal(tiny.rows(24), 8), config)


def test_rows_without_a_prediction_leave_the_weights_alone() -> None:
    empty = packing.pack_pieces([Piece([0, 2], 0, number) for number in range(128)], 1, 32, 0, seed=0)
    config = tiny.train(steps=1, weight_decay=0.0)
    engine = Engine(tiny.encoder(), config, 1)
    before = {name: tensors["master"].clone() for name, tensors in engine.state()}
    (step,) = tiny.advance(engine, tiny.deal(empty, 8), config)
    assert (step.loss, step.gradient_norm) == (0.0, 0.0)
    assert all(torch.equal(tensors["master"], before[name]) for name, tensors in engine.state())


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]
)
def test_weights_decay_but_biases_and_norms_do_not(stage: int, offload: bool) -> None:
    # With a gradient of zero Adam moves nothing, so a step leaves (1 - rate x decay) of what decays.
    config = tiny.train(zero_stage=stage, offload=offload, weight_decay=0.5)
    model = tiny.encoder()
    for parameter in model.parameters():
        parameter.data.add_(0.25)  # a bias of zero would not show that it decays
    bare = {
        f"{place}.{name}"
        for place, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, torch.nn.LayerNorm)
    }
    engine = Engine(model, config, 1)
    before = {name: tensors["master"].clone() for name, tensors in engine.state()}
    inputs = tiny.task().inputs(tiny.deal(tiny.rows(8), 8)[0])
    engine.backward(engine.forward(inputs.model).sum() * 0.0)
    engine.step(0.1)
    for name, tensors in engine.state():
        kept = 1.0 if name in bare else 0.95
        torch.testing.assert_close(tensors["master"], before[name] * kept, rtol=1e-6, atol=0.0)
    assert 0 < len(bare & before.keys()) < len(before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize(("stage", "offload"), [(0, False), (2, False), (3, False), (2, True)])
@pytest.mark.parametrize("kind", ["ia3", "lora"])
def test_scales_of_ia3_do_not_decay_and_matrices_of_lora_do(kind: str, stage: int, offload: bool) -> None:
    config = tiny.train(zero_stage=stage, offload=offload, weight_decay=0.5)
    model = tiny.encoder()
    adapters.add(model, Adapter.model_validate({"kind": kind}))
    engine = Engine(model, config, 1)
    before = {name: tensors["master"].clone() for name, tensors in engine.state()}
    assert all(tensor.ndim == 2 for tensor in before.values())
    inputs = tiny.task().inputs(tiny.deal(tiny.rows(8), 8)[0])
    engine.backward(engine.forward(inputs.model).sum() * 0.0)
    engine.step(0.1)
    for name, tensors in engine.state():
        kept = {"ia3": 1.0, "lora": 0.95}[kind]
        torch.testing.assert_close(tensors["master"], before[name] * kept, rtol=1e-6, atol=0.0)
    assert len(before) > 5


@pytest.mark.parametrize(("stage", "offload", "precision"), SETUPS)
def test_a_resumed_run_repeats_the_undisturbed_one_to_the_bit(
    stage: int, offload: bool, precision: str, tmp_path: Path
) -> None:
    values = {"zero_stage": stage, "offload": offload, "precision": precision, "micro_batch_size": 4}
    config, batches, model = (
        tiny.train(steps=6, **values),
        tiny.deal(tiny.rows(48), 4),
        tiny.encoder(dropout=0.1),
    )
    first = Engine(model, config, 2)
    undisturbed = []
    for step in loop.steps(first, batches, tiny.task(), config, start=0, seed=0):
        if step.number == 3:
            progress = Progress(step=3, position=step.position)
            checkpoint.save(first, progress, "", tiny.export(model), str(tmp_path), tiny.STORAGE)
        undisturbed.append(step)
    second = Engine(tiny.encoder(dropout=0.1, seed=7), config, 2)
    found, refused = checkpoint.newest(str(tmp_path), tiny.STORAGE)
    assert found is not None
    assert refused == []
    checkpoint.load(second, found, tiny.STORAGE)
    resumed = tiny.advance(second, batches, config, start=3)
    # DeepSpeed's Adam on the host multiplies its bias correction up step by step, but takes a power after a load.
    tolerance = 1e-6 if offload else 0.0
    for one, other in zip(resumed, undisturbed[3:], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=tolerance, abs=0.0)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=tolerance, abs=0.0)
    assert len({step.loss for step in resumed}) == 3


def test_validation_in_between_does_not_disturb_training() -> None:
    config, batches = tiny.train(steps=4), tiny.deal(tiny.rows(32), 8)
    held_out = validation.batches(tiny.held_out({"de": 20, "en": 20}), 8)
    losses = []
    for validating in (False, True):
        engine = Engine(tiny.encoder(dropout=0.1), config, 1)
        curve = []
        for step in loop.steps(engine, batches, tiny.task(), config, start=0, seed=0):
            curve.append(step.loss)
            if validating:
                loop.validate(engine, held_out, tiny.task())
        losses.append(curve)
    assert losses[0] == losses[1]


def brute_force(model: Any, micro_batches: list[Any]) -> dict[str, dict[str, float]]:
    """Scores of each language, document by document through plain `transformers`, in float64."""
    tokens, task = tiny.tokens(), tiny.task()
    sums = {name: {"nats": 0.0, "hits": 0, "count": 0, "characters": 0} for name in tiny.LANGUAGES}
    for batch in micro_batches:
        changed_BT, masked_N, targets_N = masked.mask(batch, task.vocabulary, Objective(), task.seed)
        targets = dict(zip(masked_N.tolist(), targets_N.tolist(), strict=True))
        column, row = 0, -1
        for place, length, language in zip(batch.batch_D, batch.lengths_D, batch.languages_D, strict=True):
            column = column if place == row else 0
            row = int(place)
            ids = torch.tensor(changed_BT[row, column : column + length])[None]
            with torch.no_grad():
                logits = model.model(input_ids=ids).logits[0].double()
            for offset in range(length):
                target = targets.get(row * 32 + column + offset)
                if target is None:
                    continue
                entry = sums[tiny.LANGUAGES[language]]
                entry["nats"] -= float(logits[offset].log_softmax(0)[target])
                entry["hits"] += int(logits[offset].argmax()) == target
                entry["count"] += 1
                entry["characters"] += len(tokens.convert_ids_to_tokens(target).replace("▁", " "))
            column += int(length)
    return {
        name: {
            "loss": entry["nats"] / entry["count"],
            "accuracy": entry["hits"] / entry["count"],
            "bits_per_char": entry["nats"] / math.log(2) / entry["characters"],
            "predictions": entry["count"],
        }
        for name, entry in sums.items()
    }


def test_validation_equals_a_brute_force() -> None:
    config = tiny.train(steps=15, lr=2e-2)
    model = tiny.encoder(dropout=0.1)
    engine = Engine(model, config, 1)
    tiny.advance(engine, tiny.deal(tiny.rows(120), 8), config)
    micro_batches = validation.batches(tiny.held_out({"de": 60, "en": 25}), 8)
    scores = loop.validate(engine, micro_batches, tiny.task())
    expected = brute_force(model.eval(), micro_batches)
    assert [len(batch) for batch in micro_batches][-1] < 8  # the last one is short
    assert list(scores) == ["de", "en", "macro"]
    for name in tiny.LANGUAGES:
        assert scores[name] == pytest.approx(expected[name], rel=1e-5)
        assert scores[name]["accuracy"] > 0
    for metric in ("loss", "accuracy", "bits_per_char"):
        mean = (expected["de"][metric] + expected["en"][metric]) / 2
        assert scores["macro"][metric] == pytest.approx(mean, rel=1e-5)


def test_a_language_without_held_out_text_is_left_out() -> None:
    engine = Engine(tiny.encoder(), tiny.train(), 1)
    one = loop.validate(engine, validation.batches(tiny.held_out({"de": 9, "en": 0}), 4), tiny.task())
    assert list(one) == ["de", "macro"]
    assert one["macro"]["loss"] == one["de"]["loss"]
    assert loop.validate(engine, [], tiny.task()) == {}
