"""ZeRO stages on two gloo workers: one curve, whatever the stage, the number of workers or the checkpoint's writer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlray.config import Adapter
from mlray.models import adapters
from mlray.training import checkpoint
from mlray.training.checkpoint import Progress
from mlray.training.engine import Engine
from tests.unit import tiny

MICRO, STEPS = 4, 20
ROWS = 2 * MICRO * STEPS
KINDS = ("lora", "dora", "ia3")


def curve(stage: int, rank: int, world_size: int, **settings: object) -> list[float]:
    """Losses of 20 steps of 8 rows, dealt to the workers as the stream deals them."""
    config = tiny.train(zero_stage=stage, micro_batch_size=MICRO, **settings)
    engine = Engine(tiny.encoder(dropout=0.1), config, 2 // world_size)
    batches = tiny.deal(tiny.rows(ROWS), MICRO, rank, world_size)
    return [step.loss for step in tiny.advance(engine, batches, config)]


def resume(
    folder: Path, writer: int, reader: int, rank: int, world_size: int
) -> tuple[list[float], list[float]]:
    """Ten steps at one stage, a checkpoint, ten more at another; and the same ten more without a break."""
    batches = tiny.deal(tiny.rows(ROWS), MICRO, rank, world_size)
    half = tiny.train(zero_stage=writer, micro_batch_size=MICRO, steps=10, schedule="constant")
    whole = half.model_copy(update={"steps": STEPS})
    model = tiny.encoder()
    engine = Engine(model, half, 2 // world_size)
    tiny.advance(engine, batches, half)
    export = tiny.export(model)
    checkpoint.save(engine, Progress(step=10), "", export, str(folder), tiny.STORAGE)
    undisturbed = [step.loss for step in tiny.advance(engine, batches, whole, start=10)]
    again = Engine(tiny.encoder(seed=1), whole.model_copy(update={"zero_stage": reader}), 2 // world_size)
    found, _ = checkpoint.newest(str(folder), tiny.STORAGE)
    assert found is not None
    checkpoint.load(again, found, tiny.STORAGE)
    return undisturbed, [step.loss for step in tiny.advance(again, batches, whole, start=10)]


def adapt(kind: str, folder: Path, rank: int, world_size: int) -> list[str]:
    """Trains an adapter at stage 3 for five steps and saves it; returns the frozen tensors that have moved.

    The feed-forward matrices are above DeepSpeed's threshold (100,000 elements), so each worker has a half of them.
    """
    model = tiny.encoder(hidden_size=64, intermediate_size=1600)
    digest = adapters.digest(model)
    wrapped = adapters.add(model, Adapter.model_validate({"kind": kind}))
    frozen = {name: one.detach().clone() for name, one in model.named_parameters() if not one.requires_grad}
    assert max(tensor.numel() for tensor in frozen.values()) > 100_000
    config = tiny.train(zero_stage=3, micro_batch_size=MICRO, steps=5, lr=1e-2)
    engine = Engine(model, config, 2 // world_size)
    tiny.advance(engine, tiny.deal(tiny.rows(2 * MICRO * 5), MICRO, rank, world_size), config)
    weights = {name: tensors["master"] for name, tensors in engine.state()}
    now = tiny.gathered(model, frozen)
    if rank == 0:
        adapters.export(wrapped, digest, "masked", tiny.tokens(), weights, folder / f"{kind}-{world_size}")
    return [name for name, tensor in frozen.items() if not torch.equal(tensor, now[name])]


def work(rank: int, folder: str) -> None:
    """One of two workers: everything that needs two, in one start."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    results: dict[str, object] = {f"stage {stage}": curve(stage, rank, 2) for stage in (0, 1, 2, 3)}
    results["offload"] = curve(2, rank, 2, offload=True)
    for stage in (0, 1, 2, 3):
        results[f"bf16 {stage}"] = curve(stage, rank, 2, precision="bf16")
    results["2 to 3"] = resume(Path(folder) / "two-to-three", 2, 3, rank, 2)
    results["3 to 1"] = resume(Path(folder) / "three-to-one", 3, 1, rank, 2)
    for kind in KINDS:
        results[kind] = adapt(kind, Path(folder), rank, 2)
    if rank == 0:
        torch.save(results, f"{folder}/results")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("zero")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    loaded: dict[str, list[float]] = torch.load(folder / "results", weights_only=True)
    loaded["folder"] = [str(folder)]  # type: ignore[list-item]
    return loaded


pytestmark = tiny.DEEPSPEED_WARNINGS


@pytest.mark.parametrize("case", ["stage 1", "stage 2", "stage 3", "offload"])
def test_every_stage_gives_the_same_curve(case: str, results: dict[str, list[float]]) -> None:
    assert len(results[case]) == STEPS
    assert results["stage 0"][-1] < results["stage 0"][0] - 0.2
    assert results[case] == pytest.approx(results["stage 0"], abs=1e-4)


def test_one_worker_gives_the_curve_of_two(results: dict[str, list[float]]) -> None:
    assert curve(0, 0, 1) == pytest.approx(results["stage 0"], abs=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_learns_alike(stage: int, results: dict[str, list[float]]) -> None:
    assert results[f"bf16 {stage}"] == pytest.approx(results["stage 0"], abs=0.1)


@pytest.mark.parametrize("case", ["2 to 3", "3 to 1"])
def test_a_checkpoint_of_one_stage_goes_on_at_another(case: str, results: dict[str, list[float]]) -> None:
    undisturbed, resumed = results[case]
    assert resumed == pytest.approx(undisturbed, abs=1e-5)


def test_two_workers_checkpoint_goes_on_with_one(results: dict[str, list[float]]) -> None:
    folder = Path(str(results["folder"][0])) / "two-to-three"
    config = tiny.train(zero_stage=0, micro_batch_size=MICRO, schedule="constant")
    engine = Engine(tiny.encoder(seed=2), config, 2)
    found, _ = checkpoint.newest(str(folder), tiny.STORAGE)
    assert found is not None
    checkpoint.load(engine, found, tiny.STORAGE)
    batches = tiny.deal(tiny.rows(ROWS), MICRO)
    losses = [step.loss for step in tiny.advance(engine, batches, config, start=10)]
    assert losses == pytest.approx(results["2 to 3"][0], abs=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_save_the_adapter_of_one_and_move_nothing_else(
    kind: str, results: dict[str, list[float]], tmp_path: Path
) -> None:
    assert results[kind] == []
    assert adapt(kind, tmp_path, 0, 1) == []
    two, one = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (Path(str(results["folder"][0])) / f"{kind}-2", tmp_path / f"{kind}-1")
    )
    assert two.keys() == one.keys()
    assert len(two) > 5
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], rtol=0.0, atol=1e-4)
