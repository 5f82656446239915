"""An optimiser step whose loss looks at the whole global batch: contrastive learning over all workers' vectors.

GradCache (Gao et al. 2021): the vectors of all micro-batches are made first, the loss gives its gradient to each of
them, and every micro-batch is then read again, with a graph, for this gradient. Micro-batches whose activations fit
keep their graph and are read once. The weights' gradients are reduced over the workers once a step, at any ZeRO stage.
Shape letters: N texts of all workers, n of this one, H width of a vector, L languages.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import psutil
import torch

from mlray.config import Contrastive
from mlray.objectives import contrastive, pairing
from mlray.objectives.collation import Inputs
from mlray.objectives.pairing import Texts
from mlray.objectives.table import Task
from mlray.schema import PackedBatch
from mlray.training.engine import Engine
from mlray.training.turns import turns, with_macro

_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.4
"""Of the memory that is free at a step's start: what its graphs may take."""


def update(
    engine: Engine, inputs: list[Inputs], task: Task, rate: float, pairs: float, key: tuple[int, int]
) -> tuple[float, float, int]:
    """Forward, loss over all workers' pairs, backward, and the optimiser step.

    Returns the own loss sum, the gradient norm, and how many own pairs met another of the same item.

    Args:
        engine: made with `over_batch`.
        inputs: own micro-batches.
        task: of texts' vectors.
        rate: learning rate.
        pairs: of all workers.
        key: seed and step, for dropout.
    """
    vectors = _read(engine, inputs, task.contrastive, key)
    texts = [pairing.known(one.texts).stack() for one in inputs]
    total, together, gradient_nH = _loss(engine, torch.cat([part.detach() for part in vectors]), texts, task)
    gradient_nH *= engine.world_size / max(pairs, 1.0)
    parts = torch.split(gradient_nH, [len(part) for part in vectors])
    with engine.one_reduction():
        for place, one in enumerate(inputs):
            output = vectors[place]
            if not output.requires_grad:
                engine.seed(key, place)
                output = engine.forward(one.model)
            engine.backward((output * parts[place]).sum())
            vectors[place] = output.detach()  # its graph is not needed any more
    return total, engine.step(rate), together


def _read(
    engine: Engine, inputs: list[Inputs], config: Contrastive, key: tuple[int, int]
) -> list[torch.Tensor]:
    """The vectors of each micro-batch; of the first ones, as many as fit, with a graph."""
    vectors: list[torch.Tensor] = []
    budget = 0.0 if config.cache == "always" else _free_bytes(engine)
    largest = max(one.model["tokens_BT"].numel() for one in inputs)
    kept = len(inputs) if config.cache == "never" else 1
    for place, one in enumerate(inputs):
        engine.seed(key, place)
        if place == 0 and config.cache == "auto" and len(inputs) > 1:
            weighed = _Weighed(engine)
            with weighed:
                vectors.append(engine.forward(one.model))
            if weighed.sharded:
                vectors[0] = vectors[0].detach()  # weighed, it keeps whole weights alive: it is read twice
            each = weighed.bytes * largest / one.model["tokens_BT"].numel()
            # With sharded weights a forward and a backward are collective calls: all keep as many as the poorest.
            kept = min(engine.gather(max(int(budget // max(each, 1.0)), 1)))
            continue
        with torch.set_grad_enabled(place < kept):
            vectors.append(engine.forward(one.model))
    return vectors


class _Weighed(torch.autograd.graph.saved_tensors_hooks):
    """Adds up what a graph keeps alive beside the weights; under ZeRO-3 those are put together for the while."""

    def __init__(self, engine: Engine) -> None:
        self.bytes = 0
        self.sharded = any(hasattr(weight, "ds_id") for weight in engine.weights)
        self._weights = engine.weights
        self._seen = self._held()
        super().__init__(self._weigh, lambda tensor: tensor)

    def _weigh(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if self.sharded:
            self._seen |= self._held()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def _held(self) -> set[int]:
        return {weight.untyped_storage().data_ptr() for weight in self._weights}


def _free_bytes(engine: Engine) -> float:
    if engine.device.type == "cuda":
        unused = torch.cuda.memory_reserved(engine.device) - torch.cuda.memory_allocated(engine.device)
        return _SHARE * (torch.cuda.mem_get_info(engine.device)[0] + unused)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", engine.world_size))
    return _SHARE * _host_bytes() / beside


def _host_bytes() -> float:
    """Memory that is left on the machine, or in the container (cgroup v2) that this process runs in."""
    left = float(psutil.virtual_memory().available)
    try:
        limit, used, told = (
            (_CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat")
        )
    except OSError:
        return left
    if limit.strip() == "max":
        return left
    cached = dict(line.split() for line in told.splitlines()).get(
        "inactive_file", "0"
    )  # given up when asked for
    return min(left, float(limit) - float(used) + float(cached))


def _loss(
    engine: Engine, own_nH: torch.Tensor, texts: list[np.ndarray], task: Task
) -> tuple[float, int, torch.Tensor]:
    """Loss sum of own pairs, how many met another of the same item, and all workers' gradient to own vectors (n, H)."""
    own_5n = torch.from_numpy(Texts.join(texts).stack()).to(engine.device)
    everyone = gather_rows(engine, own_nH)
    told = [part.T.cpu().numpy() for part in gather_rows(engine, own_5n.T.contiguous())]
    pairs = [int(part[1].max(initial=-1)) + 1 for part in told]
    first = sum(pairs[: engine.rank])
    own_P, joined = np.arange(first, first + pairs[engine.rank]), Texts.join(told)
    items_N = contrastive.groups(joined)
    total, _, gradient_NH = contrastive.loss(torch.cat(everyone), joined, own_P, task.contrastive, items_N)
    if engine.world_size > 1:
        torch.distributed.all_reduce(gradient_NH)
    own_nH = torch.split(gradient_NH, [len(part) for part in everyone])[engine.rank]
    return total, contrastive.together(joined, own_P, items_N), own_nH


def gather_rows(engine: Engine, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of all workers, which differ in their first dimension alone; a collective call."""
    if engine.world_size == 1:
        return [tensor]
    lengths = engine.total(np.eye(engine.world_size)[engine.rank] * len(tensor)).astype(int).tolist()
    padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def validate(engine: Engine, batches: list[PackedBatch], task: Task) -> dict[str, dict[str, float]]:
    """Loss (nats) and accuracy of each language's held-out pairs among themselves, and the `macro` mean.

    Every worker gives the same batches; see `turns`.
    """
    vectors, told = [], []
    engine.train(False)
    with torch.no_grad():
        for place, batch, counts in turns(engine, batches):
            inputs = task.inputs(batch)
            output = engine.forward(inputs.model)
            own = len(output) if counts else 0
            vectors.append(output[:own])
            told.append(np.vstack([pairing.known(inputs.texts).stack(), batch.languages_D])[:, :own])
            told[-1][1] += place << 32  # no pair has the number of another batch's
    engine.train()
    if not batches:
        return {}
    return _figures(
        torch.cat(gather_rows(engine, torch.cat(vectors))),
        np.concatenate(
            [
                part.cpu().numpy()
                for part in gather_rows(engine, torch.from_numpy(np.hstack(told).T.copy()).to(engine.device))
            ]
        ).T,
        task,
    )


def _figures(vectors_NH: torch.Tensor, told_6N: np.ndarray, task: Task) -> dict[str, dict[str, float]]:
    table = {}
    for number, name in enumerate(task.languages):
        own_N = np.flatnonzero(told_6N[5] == number)
        if not len(own_N):
            continue
        names, pairs, roles, spoken, items = told_6N[:5, own_N]
        unique, pairs = np.unique(pairs, return_inverse=True)
        every = np.arange(len(unique))
        total, found, _ = contrastive.loss(
            vectors_NH[torch.from_numpy(own_N).to(vectors_NH.device)],
            Texts(names, pairs, roles, spoken, items),
            every,
            task.contrastive,
        )
        count = len(every)
        table[name] = {
            "loss": total / count,
            "accuracy": found / count,
            "bits_per_char": 0.0,
            "predictions": float(count),
        }
    return with_macro(table)
