"""Two gloo workers: what they tell and score is what one does, and the fault of one ends the work of both."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from mlray.config import RunError, Train
from mlray.corpus import validation
from mlray.training import checkpoint, loop
from mlray.training.checkpoint import Progress
from mlray.training.engine import Engine
from tests.unit import tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

MICRO, STEPS, HALF = 4, 6, 3
HELD_OUT = {"de": 60, "en": 44}


def settings(stage: int) -> Train:
    """Six steps of eight rows."""
    return tiny.train(zero_stage=stage, micro_batch_size=MICRO, steps=STEPS)


def told(engine: Engine, stage: int, start: int = 0) -> list[dict[str, Any]]:
    """What each step from `start` on tells."""
    batches = tiny.deal(tiny.rows(2 * MICRO * STEPS), MICRO, engine.rank, engine.world_size)
    return [
        {
            "loss": step.loss,
            "position": [step.position.window, step.position.row],
            "digest": step.digest,
            "tokens": step.tokens.tolist(),
            "documents": step.documents.tolist(),
        }
        for step in tiny.advance(engine, batches, settings(stage), start=start)
    ]


def engine_of(stage: int, world_size: int, seed: int = 0) -> Engine:
    return Engine(tiny.encoder(dropout=0.1, seed=seed), settings(stage), 2 // world_size)


def scores(engine: Engine) -> dict[str, dict[str, float]]:
    """Validation on an odd number of micro-batches."""
    return loop.validate(engine, validation.batches(tiny.held_out(HELD_OUT), MICRO), tiny.task())


def resumed(folder: Path, stage: int, world_size: int) -> list[float]:
    """Losses after the checkpoint of step 3 in `folder`."""
    engine = engine_of(stage, world_size, seed=5)
    found, _ = checkpoint.newest(str(folder), tiny.STORAGE)
    assert found is not None
    checkpoint.load(engine, found, tiny.STORAGE)
    return [step["loss"] for step in told(engine, stage, start=HALF)]


def save_halfway(folder: Path, stage: int, world_size: int) -> list[float]:
    """Losses of all six steps, with a checkpoint after the third."""
    model = tiny.encoder(dropout=0.1)
    engine = Engine(model, settings(stage), 2 // world_size)
    batches = tiny.deal(tiny.rows(2 * MICRO * STEPS), MICRO, engine.rank, world_size)
    losses = []
    for step in loop.steps(engine, batches, tiny.task(), settings(stage), start=0, seed=0):
        losses.append(step.loss)
        if step.number == HALF:
            progress = Progress(step=HALF, position=step.position)
            checkpoint.save(engine, progress, "", tiny.export(model), str(folder), tiny.STORAGE)
    return losses


def early_end(rank: int) -> tuple[int, str]:
    """Steps done, and what is raised, when the second worker's stream ends after three batches."""
    batches = tiny.deal(tiny.rows(2 * MICRO * STEPS), MICRO, rank, 2)
    stream = batches[: 3 if rank else None]
    done, message = 0, ""
    try:
        for step in loop.steps(engine_of(2, 2), stream, tiny.task(), settings(2), start=0, seed=0):
            done = step.number
    except RunError as error:
        message = str(error)
    return done, message


def failed_save(folder: Path, rank: int) -> str:
    """What is raised when the second worker's disk is full."""
    model = tiny.encoder()
    engine = Engine(model, settings(3), 1)
    if rank == 1:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        checkpoint.save(engine, Progress(step=HALF + 1), "", tiny.export(model), str(folder), tiny.STORAGE)
    except RunError as error:
        return str(error)
    finally:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ""


def work(rank: int, folder: str) -> None:
    """One of two workers: everything that needs two, in one start."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    root = Path(folder)
    results: dict[str, Any] = {}
    for stage in (0, 3):
        engine = engine_of(stage, 2)
        results[f"steps {stage}"] = told(engine, stage)
        results[f"scores {stage}"] = scores(engine)
    for stage in (2, 3):
        results[f"one to two {stage}"] = resumed(root / "one", stage, 2)
    for stage in (0, 2, 3):
        results[f"whole {stage}"] = save_halfway(root / f"two-{stage}", stage, 2)
        results[f"resumed {stage}"] = resumed(root / f"two-{stage}", stage, 2)
    results["early end"] = early_end(rank)
    results["failed save"] = failed_save(root / "two-3", rank)
    found, _ = checkpoint.newest(str(root / "two-3"), tiny.STORAGE)
    results["after it"] = found.progress.step if found else None
    (root / f"results-{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """Losses of one worker, which leaves a checkpoint of step 3 in the folder `one`."""
    return save_halfway(folder / "one", 0, 1)


@pytest.fixture(scope="module")
def both(folder: Path, alone: list[float]) -> list[dict[str, Any]]:
    """What the two workers found, the first worker's first."""
    assert len(alone) == STEPS
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("stage", [0, 3])
def test_two_workers_tell_what_one_tells(stage: int, both: list[dict[str, Any]]) -> None:
    expected = told(engine_of(stage, 1), stage)
    for results in both:
        for one, other in zip(results[f"steps {stage}"], expected, strict=True):
            assert one.pop("loss") == pytest.approx(other["loss"], abs=1e-5)
            assert one == {key: value for key, value in other.items() if key != "loss"}


@pytest.mark.parametrize("stage", [0, 3])
def test_two_workers_score_what_one_scores(stage: int, both: list[dict[str, Any]]) -> None:
    micro_batches = validation.batches(tiny.held_out(HELD_OUT), MICRO)
    assert len(micro_batches) % 2 == 1  # one worker has a turn with nothing left
    engine = engine_of(stage, 1)
    told(engine, stage)
    expected = scores(engine)
    for results in both:
        for name, row in results[f"scores {stage}"].items():
            assert row == pytest.approx(expected[name], rel=1e-4)
            assert row.get("predictions") == expected[name].get("predictions")


@pytest.mark.parametrize("stage", [2, 3])
def test_one_workers_checkpoint_goes_on_with_two(
    stage: int, alone: list[float], both: list[dict[str, Any]]
) -> None:
    for results in both:
        assert results[f"one to two {stage}"] == pytest.approx(alone[HALF:], abs=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_workers_resume_to_the_bit(stage: int, both: list[dict[str, Any]]) -> None:
    for results in both:
        assert results[f"resumed {stage}"] == results[f"whole {stage}"][HALF:]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_workers_checkpoint_goes_on_with_one(
    stage: int, folder: Path, both: list[dict[str, Any]]
) -> None:
    assert resumed(folder / f"two-{stage}", 0, 1) == pytest.approx(both[0][f"whole {stage}"][HALF:], abs=1e-4)


def test_a_stream_that_ends_on_one_worker_ends_both(both: list[dict[str, Any]]) -> None:
    for results in both:
        assert results["early end"] == [3, "the stream of batches ended before step 4 of 6"]


def test_a_worker_that_cannot_write_fails_both_and_costs_nothing(
    folder: Path, both: list[dict[str, Any]]
) -> None:
    message = both[0]["failed save"]
    assert message.startswith(f"{folder / 'two-3' / 'step-00000004'} could not be written: ")
    assert "\n" not in message
    assert both[1]["failed save"] == message
    assert [results["after it"] for results in both] == [HALF, HALF]
