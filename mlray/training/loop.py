"""The one training loop, free of Ray: an engine, batches and an objective go in, steps come out.

    for step in loop.steps(engine, batches, task, config.train, start=0, seed=0):
        print(step.number, step.loss)

Every worker calls it alike. The only collective calls of a step are two all-reduces of a few numbers beside
DeepSpeed's own, and all workers learn from the first of them whether every one has its batches: a stream
that ends early on one worker ends the step on all, so no step hangs.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mlray.config import RunError, Train
from mlray.corpus.validation import row_languages
from mlray.objectives.collation import Inputs
from mlray.objectives.table import Task
from mlray.schema import PackedBatch, Position
from mlray.training import gradcache
from mlray.training.engine import Engine
from mlray.training.turns import turns, with_macro


@dataclass(frozen=True)
class Step:
    """One optimiser step, summed over all workers."""

    number: int
    """Steps done, this one included."""
    loss: float
    """Mean loss of a prediction in nats."""
    rate: float
    gradient_norm: float
    position: Position
    """Where the stream stands after it."""
    digest: int
    """Sum of hashes of the documents it saw, whatever worker saw them: two runs that saw the same agree."""
    tokens: np.ndarray
    """Tokens per language."""
    documents: np.ndarray
    """Documents (or pieces of long ones) per language."""
    together: float
    """Pairs that met another of the same item in the global batch, of an objective over pairs."""
    seconds: float
    waited_s: float
    """Part of `seconds` spent waiting for batches on this worker."""


def steps(
    engine: Engine, batches: Iterable[PackedBatch], task: Task, config: Train, *, start: int, seed: int
) -> Iterator[Step]:
    """Trains from step `start` to `config.steps` and yields after each.

    The gradient is that of the mean over all predictions of the global batch, however they are dealt out.

    Raises:
        RunError: the stream ended before the last step, or the loss is no number any more; on all workers alike.
    """
    stream = iter(batches)
    engine.train()
    for number in range(start, config.steps):
        begin = time.perf_counter()
        micro_batches = list(itertools.islice(stream, engine.accumulation))
        waited_s = time.perf_counter() - begin
        inputs = [task.inputs(batch) for batch in micro_batches]
        predictions, present = engine.total(
            np.array([sum(len(one.targets_N) for one in inputs), len(micro_batches)], dtype=np.float64)
        )
        if present < engine.accumulation * engine.world_size:
            raise RunError(f"the stream of batches ended before step {number + 1} of {config.steps}")
        rate = learning_rate(config, number)
        update = gradcache.update if task.over_batch else _update
        loss, norm, together = update(engine, inputs, task, rate, float(predictions), (seed, number))
        shared = _share(engine, micro_batches, loss, together, len(task.languages))
        if not math.isfinite(shared.loss) or not math.isfinite(norm):
            raise RunError(
                f"step {number + 1} has a loss of {shared.loss / max(float(predictions), 1.0)} and a gradient norm of "
                f"{norm}; lower train.lr or raise train.warmup_steps; the last checkpoint is from before it"
            )
        yield Step(
            number=number + 1,
            loss=shared.loss / max(float(predictions), 1.0),
            rate=rate,
            gradient_norm=norm,
            position=shared.position,
            digest=shared.digest,
            tokens=shared.tokens,
            documents=shared.documents,
            together=shared.together,
            seconds=time.perf_counter() - begin,
            waited_s=waited_s,
        )


def learning_rate(config: Train, step: int) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then cosine, linear or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min((step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1), 1.0)
    if config.schedule == "constant":
        return config.lr
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


def _update(
    engine: Engine, inputs: list[Inputs], task: Task, rate: float, predictions: float, key: tuple[int, int]
) -> tuple[float, float, int]:
    """Forward and backward of a worker's micro-batches and the optimiser step; see `gradcache.update`."""
    scale = engine.accumulation * engine.world_size / max(predictions, 1.0)
    losses, norm = [], 0.0
    for place, one in enumerate(inputs):
        engine.seed(key, place)
        loss = task.loss(engine.forward(one.model), one)
        engine.backward(loss * scale)
        norm = engine.step(rate)
        losses.append(loss.detach())
    return float(torch.stack(losses).sum()), norm, 0


@dataclass(frozen=True)
class _Shared:
    """What the workers add up after a step."""

    position: Position
    loss: float
    digest: int
    together: float
    tokens: np.ndarray
    documents: np.ndarray


def _share(
    engine: Engine, batches: list[PackedBatch], loss: float, together: int, num_languages: int
) -> _Shared:
    """One all-reduce for everything that a step tells: the last worker holds the last rows."""
    last = batches[-1].next_position if engine.rank == engine.world_size - 1 else Position(0, 0)
    tokens, documents = np.zeros(num_languages), np.zeros(num_languages)
    digest = 0
    for batch in batches:
        tokens += np.bincount(batch.languages_D, weights=batch.lengths_D, minlength=num_languages)
        documents += np.bincount(batch.languages_D, minlength=num_languages)
        # Fibonacci hashing to 31 bits; sums of that many documents are exact in float64.
        hashes = (batch.documents_D.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)
        digest += int(hashes.sum())
    numbers = np.array([last.window, last.row, loss, digest, together], dtype=np.float64)
    total = engine.total(np.concatenate([numbers, tokens, documents]))
    first, second = 5, 5 + num_languages
    return _Shared(
        position=Position(int(total[0]), int(total[1])),
        loss=float(total[2]),
        digest=int(total[3]),
        together=float(total[4]),
        tokens=total[first:second],
        documents=total[second:],
    )


def validate(engine: Engine, batches: list[PackedBatch], task: Task) -> dict[str, dict[str, float]]:
    """Loss (nats a prediction), accuracy and bits per character (0 for labels) of each language, and the `macro` mean.

    Every worker gives the same batches; see `turns`.
    """
    if task.over_batch:
        return gradcache.validate(engine, batches, task)
    L = len(task.languages)
    sums = np.zeros((4, L))
    engine.train(False)
    with torch.no_grad():
        for _, batch, counts in turns(engine, batches):
            scores = _score(engine, batch, task, L)
            sums += scores if counts else 0.0
    engine.train()
    losses, correct, predictions, characters = engine.total(sums.ravel()).reshape(4, L).tolist()
    table = {
        name: {
            "loss": losses[i] / predictions[i],
            "accuracy": correct[i] / predictions[i],
            "bits_per_char": losses[i] / math.log(2) / characters[i] if characters[i] else 0.0,
            "predictions": predictions[i],
        }
        for i, name in enumerate(task.languages)
        if predictions[i]
    }
    return with_macro(table)


def _score(engine: Engine, batch: PackedBatch, task: Task, num_languages: int) -> np.ndarray:
    inputs = task.inputs(batch)
    losses_N, correct_N = (
        values.cpu().numpy() for values in task.scores(engine.forward(inputs.model), inputs)
    )
    languages_N = row_languages(batch)[inputs.rows_N]
    columns = (losses_N, correct_N, np.ones(len(losses_N)), inputs.characters_N)
    return np.stack([np.bincount(languages_N, weights=column, minlength=num_languages) for column in columns])
