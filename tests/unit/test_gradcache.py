"""GradCache: whatever the chunks, the workers and the ZeRO stage, the gradient is that of the whole batch at once."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mlray.config import Contrastive, Model, Objective, RunConfig
from mlray.corpus import packing, validation
from mlray.corpus.windows import Window
from mlray.models import embedder, tokenizer
from mlray.objectives import contrastive, pairing
from mlray.objectives.table import Task
from mlray.schema import SEPARATOR
from mlray.training import checkpoint, gradcache, loop
from mlray.training.checkpoint import Progress
from mlray.training.engine import Engine
from tests.unit import tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

PAIRS, LENGTH = 32, 64
LOSS = Contrastive(temperature=0.1, learn_temperature=True, negatives="all", dimensions=(8,), margin=0.0)
REDUCING = ("all_reduce", "reduce", "reduce_scatter_fn", "reduce_scatter")
"""Of `deepspeed.comm`: what DeepSpeed itself reduces, and not the gradient of the vectors."""
WIDE = 8192
"""Numbers of the feed-forward part, whose tensors ZeRO-3 then really shards."""


class Told(Engine):
    """An engine that keeps the gradient of its last step, whole."""

    gradients: dict[str, torch.Tensor]

    def step(self, rate: float) -> float:
        import deepspeed

        named = dict(self._engine.module.named_parameters())
        self.gradients = {
            name: (
                parameter.grad if self._stage == 0 else deepspeed.utils.safe_get_full_grad(parameter)
            ).clone()
            for name, parameter in named.items()
        }
        return super().step(rate)


def model(dropout: float = 0.0, width: int = 24) -> embedder.Embedder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": width}
    config = Model.model_validate({"family": "bert", "max_positions": 64, "dropout": dropout, **sizes})
    return embedder.build(config, LOSS, tiny.tokens(), None)


def task(cache: str = "auto") -> Task:
    vocabulary = tokenizer.vocabulary(tiny.tokens())
    loss = LOSS.model_copy(update={"cache": cache})
    return Task(Objective(name="contrastive"), vocabulary, ["de-en", "en"], 0, contrastive=loss)


@functools.cache
def rows(count: int = PAIRS) -> pa.Table:
    """Pairs, every third with hard negatives; some queries come twice."""
    left, right, third = (tiny.texts(name, count, seed) for name, seed in (("de", 1), ("en", 2), ("en", 3)))
    left[5], right[9] = left[2], right[1]
    joined = [
        SEPARATOR.join([one, third[i], third[-i]] if i % 3 == 0 else [one]) for i, one in enumerate(right)
    ]
    window = Window(0, left, joined, [i % 2 for i in range(count)], list(range(count)))
    return packing.pack(window, pairing.Pairs(tokenizer.encoder(tiny.tokens()), LENGTH), LENGTH, seed=0)


def expected(width: int = 24) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradient of the whole batch in one forward pass, in float64 on one process."""
    network = model(width=width).double()
    inputs = task().inputs(packing.unpack(rows()))
    vectors = double(network, inputs.model)
    total, _, gradient = contrastive.loss(
        vectors.detach(), pairing.known(inputs.texts), np.arange(PAIRS), LOSS
    )
    vectors.backward(gradient / PAIRS)
    return total / PAIRS, {
        name: p.grad.float() for name, p in network.named_parameters() if p.grad is not None
    }


def double(network: embedder.Embedder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own forward, which would otherwise end in fp32."""
    hidden = network.read(*(inputs[key] for key in ("tokens_BT", "segments_BT", "offsets_BT"))).flatten(0, 1)
    pooled = network._pool(hidden, *(inputs[key] for key in ("texts_BT", "first_N", "last_N")))
    return torch.nn.functional.normalize(pooled, dim=-1) * (0.5 * network.log_scale_1).exp()


def one_step(
    stage: int, micro: int, rank: int, world_size: int, cache: str = "always", width: int = 24
) -> dict[str, Any]:
    """Loss, gradient and number of reductions of a step on all pairs."""
    config = tiny.train(zero_stage=stage, micro_batch_size=micro, steps=1)
    engine = Told(model(width=width), config, PAIRS // (micro * world_size), over_batch=True)
    counted = Counted()
    with counted:
        (step,) = loop.steps(
            engine, tiny.deal(rows(), micro, rank, world_size), task(cache), config, start=0, seed=0
        )
    return {
        "loss": step.loss,
        "together": step.together,
        "gradients": engine.gradients,
        "reductions": counted.large,
    }


class Counted:
    """Counts the reductions of more than a thousand numbers."""

    def __enter__(self) -> None:
        import deepspeed

        self.large = 0
        self._comm = deepspeed.comm
        self._kept = {name: getattr(self._comm, name) for name in REDUCING}
        for name, function in self._kept.items():
            setattr(self._comm, name, self._counting(function))

    def _counting(self, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self.large += any(tensor.numel() > 1000 for tensor in tensors)
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self._kept.items():
            setattr(self._comm, name, function)


def work(rank: int, folder: str) -> None:
    """One of four workers: everything that needs them, in one start."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4
    )
    results: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        for micro in (8, 4, 2, 1):
            results[f"{stage} {micro}"] = one_step(stage, micro, rank, 4)
        results[f"{stage} kept"] = one_step(stage, 2, rank, 4, cache="never")
    results["wide"] = one_step(3, 2, rank, 4, width=WIDE)
    results["wide kept"] = one_step(3, 2, rank, 4, cache="never", width=WIDE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradcache, "_free_bytes", lambda _: 1e12 if rank == 1 else 0.0)
        results["uneven"] = one_step(3, 2, rank, 4, cache="auto", width=WIDE)
    if rank == 0:
        torch.save(results, f"{folder}/results")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gradcache")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=4)
    loaded: dict[str, Any] = torch.load(folder / "results", weights_only=True)
    return loaded


def same(found: dict[str, Any], atol: float, width: int = 24) -> None:
    loss, gradients = expected(width)
    assert found["loss"] == pytest.approx(loss, abs=atol)
    assert found["together"] == 4  # two pairs with one query, two with one target
    assert found["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found["gradients"][name].reshape(gradient.shape), gradient, atol=atol), name


def test_weights_are_no_activations_wherever_zero_puts_them() -> None:
    found = {}
    for stage, frozen in ((0, False), (1, False), (2, False), (0, True)):
        network = model(width=WIDE)
        if frozen:
            network.requires_grad_(False).model.embeddings.requires_grad_(True)
        engine = Engine(network, tiny.train(zero_stage=stage), 1, over_batch=True)
        weighed = gradcache._Weighed(engine)
        with weighed:
            engine.forward(task().inputs(packing.unpack(rows().slice(0, 2))).model)
        found[stage, frozen] = weighed.bytes
    assert found[1, False] == found[2, False] == found[0, False]
    assert found[0, True] < found[0, False]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_workers_with_eight_pairs_are_one_with_32(stage: int, results: dict[str, Any]) -> None:
    same(results[f"{stage} 8"], atol=1e-6)


@pytest.mark.parametrize("micro", [4, 2, 1, "kept"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_chunks_change_nothing(stage: int, micro: int | str, results: dict[str, Any]) -> None:
    same(results[f"{stage} {micro}"], atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_reduces_once_however_many_chunks(stage: int, results: dict[str, Any]) -> None:
    counts = {results[f"{stage} {micro}"]["reductions"] for micro in (8, 4, 2, 1)}
    assert len(counts) == 1
    assert counts.pop() > 0


@pytest.mark.parametrize("kind", ["wide", "wide kept"])
def test_chunks_change_nothing_where_weights_are_really_sharded(kind: str, results: dict[str, Any]) -> None:
    largest = max(gradient.numel() for gradient in results[kind]["gradients"].values())
    assert largest > 100_000  # smaller tensors stay whole in every worker (DeepSpeed's persistence threshold)
    same(results[kind], atol=1e-5, width=WIDE)


def test_workers_with_unequal_memory_keep_as_many_graphs(results: dict[str, Any]) -> None:
    wide, uneven = results["wide"], results["uneven"]
    assert uneven["loss"] == pytest.approx(wide["loss"], abs=1e-6)
    for name, gradient in wide["gradients"].items():
        assert torch.allclose(uneven["gradients"][name], gradient, atol=1e-6), name


@pytest.mark.parametrize("micro", [32, 16, 4])
def test_one_worker_with_chunks_is_the_whole_batch(micro: int) -> None:
    same(one_step(0, micro, 0, 1), atol=1e-6)


def test_reading_twice_draws_the_same_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.train(micro_batch_size=4, steps=3)
    losses = []
    for cache, budget in (("never", 0.0), ("always", 0.0), ("auto", 0.0), ("auto", 1e9)):
        monkeypatch.setattr(gradcache, "_free_bytes", lambda _, free=budget: free)
        engine = Engine(model(dropout=0.2), config, 2, over_batch=True)
        batches = tiny.deal(rows(), 4)[:6]
        steps = loop.steps(engine, batches, task(cache), config, start=0, seed=0)
        losses.append([step.loss for step in steps])
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert losses[0][2] != losses[0][0]


def test_a_learnt_temperature_goes_on_where_it_was(tmp_path: Path) -> None:
    config = tiny.train(
        steps=4, micro_batch_size=PAIRS, global_batch_size=PAIRS, warmup_steps=1, schedule="constant"
    )
    batches = tiny.deal(rows(), PAIRS) * 4

    def run(engine: Engine, first: int, last: int) -> list[float]:
        part = config.model_copy(update={"steps": last})
        taken = loop.steps(engine, batches[first:last], task(), part, start=first, seed=0)
        return [step.loss for step in taken]

    network = model()
    engine = Engine(network, config, 1, over_batch=True)
    start = float(network.log_scale_1.detach())
    before = run(engine, 0, 2)
    export = functools.partial(embedder.export, network, tiny.tokens())
    checkpoint.save(engine, Progress(step=2), RunConfig().to_yaml(), export, str(tmp_path), tiny.STORAGE)
    learnt = float(network.log_scale_1.detach())
    after = run(engine, 2, 4)
    again = model()
    resumed = Engine(again, config, 1, over_batch=True)
    found, _ = checkpoint.newest(str(tmp_path), tiny.STORAGE)
    assert found is not None
    checkpoint.load(resumed, found, tiny.STORAGE)
    assert float(again.log_scale_1.detach()) == learnt != start
    assert run(resumed, 2, 4) == pytest.approx(after, abs=1e-6)
    assert float(again.log_scale_1.detach()) == pytest.approx(float(network.log_scale_1.detach()), abs=1e-6)
    assert before[0] > after[-1]


def test_validation_looks_for_each_pair_among_its_language() -> None:
    engine = Engine(model(), tiny.train(), 1, over_batch=True)
    batches = validation.batches(rows(), 8)
    found = loop.validate(engine, batches, task())
    whole = packing.unpack(rows())
    inputs = task().inputs(whole)
    with torch.no_grad():
        vectors = model().eval()(**inputs.model)
    texts = pairing.known(inputs.texts)
    for number, name in enumerate(["de-en", "en"]):
        own = np.flatnonzero(whole.languages_D == number)
        part = pairing.Texts(*texts.stack()[:, own])
        _, pairs = np.unique(part.pairs_N, return_inverse=True)
        part = pairing.Texts(part.names_N, pairs, part.roles_N, part.languages_N, part.items_N)
        total, first, _ = contrastive.loss(vectors[torch.from_numpy(own)], part, np.arange(16), LOSS)
        assert found[name]["loss"] == pytest.approx(total / 16, abs=1e-5)
        assert found[name]["accuracy"] == first / 16
        assert found[name]["predictions"] == 16
    assert found["macro"]["loss"] == pytest.approx((found["de-en"]["loss"] + found["en"]["loss"]) / 2)


def test_a_container_has_the_memory_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = gradcache._host_bytes()
    monkeypatch.setattr(gradcache, "_CGROUP", tmp_path)
    assert gradcache._host_bytes() == pytest.approx(machine, rel=0.5)  # no such files
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 200000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert gradcache._host_bytes() == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert gradcache._host_bytes() > 1e8
