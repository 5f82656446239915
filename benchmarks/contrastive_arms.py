"""The arms of `contrastive.py`, each a process: `contrastive_arms.py FOLDER SIZE BATCH MICRO DEVICE ARM [check]`.

It prints a line of JSON when it is ready, and one after each optimiser step that a line on its input asks for. With
`check` it prints how far the gradient of its first step, not clipped, is from the reference in float64, and ends; the
arm `reference` writes that.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mlray.config import Contrastive, Model, Objective, Train
from mlray.corpus import packing
from mlray.corpus.windows import Window
from mlray.models import embedder, tokenizer
from mlray.objectives.pairing import Pairs
from mlray.objectives.table import Task
from mlray.training import loop
from mlray.training.engine import Engine

TEMPERATURE, RATE, LENGTH, CLIP = 0.05, 2e-4, 128, 1.0
CHUNK = 256
"""Texts of a pass in float64."""
Gradients = dict[str, torch.Tensor]


class Ours:
    """The job's own loop and engine, without Ray."""

    def __init__(self, folder: Path, pairs: list[list[str]], micro: int, cache: Any, clip: float) -> None:
        tokens = tokenizer.load(folder)
        loss = Contrastive(temperature=TEMPERATURE, symmetric=False, cache=cache)
        self._task = Task(
            Objective(name="contrastive"), tokenizer.vocabulary(tokens), ["xx-en"], 0, contrastive=loss
        )
        texts, others = (list(side) for side in zip(*pairs, strict=True))
        window = Window(0, texts, others, [0] * len(pairs), list(range(len(pairs))))
        table = packing.pack(window, Pairs(tokenizer.encoder(tokens), LENGTH), LENGTH, 0)
        self._batches = [packing.unpack(table.slice(start, micro)) for start in range(0, len(table), micro)]
        self.model = embedder.build(Model(path=str(folder), dropout=0.0), loss, tokens, folder)
        self._config = Train(
            steps=1 << 20, global_batch_size=len(pairs), micro_batch_size=micro, lr=RATE, warmup_steps=0,
            schedule="constant", zero_stage=0, precision="fp32", weight_decay=0.0, gradient_clipping=clip,
        )  # fmt: skip
        self._engine = Engine(self.model, self._config, len(self._batches), over_batch=True)

    def step(self) -> float:
        """An optimiser step on the whole batch: its loss."""
        steps = loop.steps(self._engine, self._batches, self._task, self._config, start=0, seed=0)
        return next(steps).loss


class Peer:
    """sentence-transformers: its model, its loss, AdamW; texts are tokenised beforehand, as ours are."""

    def __init__(
        self, folder: Path, pairs: list[list[str]], micro: int, device: str, arm: str, clip: float
    ) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses
        from sentence_transformers.util import batch_to_device

        self.model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        self.model.max_seq_length = LENGTH // 2
        self._clip = clip
        scale = 1 / TEMPERATURE
        if arm == "st":
            self._loss = losses.MultipleNegativesRankingLoss(self.model, scale=scale)
        else:
            by_tokens = {"mini_batch_num_tokens": micro * 16} if arm == "st-cached-tokens" else {}
            self._loss = losses.CachedMultipleNegativesRankingLoss(
                self.model, scale=scale, mini_batch_size=micro, **by_tokens
            )
        self._features = [
            batch_to_device(self.model.tokenize(list(side)), torch.device(device))
            for side in zip(*pairs, strict=True)
        ]
        known = Train()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), RATE, known.adam_betas, known.adam_eps, weight_decay=0.0, fused=True
        )

    def step(self) -> float:
        """An optimiser step on the whole batch: its loss."""
        self._optimizer.zero_grad()
        loss = self._loss([dict(features) for features in self._features], None)
        loss.backward()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        return float(loss.detach())


def gradients_of(model: Any, step: Callable[[], float]) -> Gradients:
    """The gradient that a step's optimiser is given, by the parameter's name."""
    found: Gradients = {}
    original = torch.optim.AdamW.step

    def kept(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) in named:
                    found[named[id(parameter)]] = parameter.grad.detach().clone()
        return original(self, *args, **kwargs)

    torch.optim.AdamW.step = kept
    try:
        step()
    finally:
        torch.optim.AdamW.step = original
    return found


def reference(folder: Path, pairs: list[list[str]], device: str) -> Gradients:
    """The gradient in float64, by autograd on the plain `transformers` model over padded chunks.

    Vectors first, then the loss in rows of the matrix, then each chunk again with the gradient of its vectors: by the
    chain rule the parts add up to one pass over the whole batch.
    """
    import transformers

    encoder = tokenizer.encoder(tokenizer.load(folder))
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float64)
    model.to(device).train()

    def vectors(texts: list[list[int]]) -> torch.Tensor:
        width = max(map(len, texts))
        ids = torch.tensor([row + [encoder.pad_id] * (width - len(row)) for row in texts], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in texts], device=device)
        hidden = model(input_ids=ids, attention_mask=mask)[0] * mask[..., None]
        return torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)

    chunks, leaves = [], []
    for side in zip(*pairs, strict=True):
        rows = [
            [encoder.start_id, *ids[: LENGTH // 2 - 2], encoder.end_id] for ids in encoder.encode(list(side))
        ]
        parts = [rows[first : first + CHUNK] for first in range(0, len(rows), CHUNK)]
        with torch.no_grad():
            leaves.append(torch.cat([vectors(part) for part in parts]))
        chunks.append(parts)
    queries, targets = (leaf.requires_grad_() for leaf in leaves)
    for own in torch.arange(len(pairs), device=device).split(CHUNK):
        logits = queries[own] @ targets.T / TEMPERATURE
        (torch.nn.functional.cross_entropy(logits, own, reduction="sum") / len(pairs)).backward()
    for parts, leaf in zip(chunks, (queries, targets), strict=True):
        assert leaf.grad is not None
        for part, gradient in zip(parts, leaf.grad.split(CHUNK), strict=True):
            vectors(part).backward(gradient)
    return {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}


def error(found: Gradients, expected: Gradients) -> float:
    """The largest difference of a number of the gradient."""
    ends = {name.rpartition("auto_model.")[2].rpartition("model.")[2]: value for name, value in found.items()}
    if missing := sorted(expected.keys() - ends.keys()):
        raise SystemExit(f"no gradient of {missing[0]}")
    return max(float((ends[name].double().cpu() - value).abs().max()) for name, value in expected.items())


def peak_bytes(device: str) -> int:
    """Largest resident memory, or memory of tensors on the GPU, since it was last forgotten."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def forget_peak(device: str) -> int:
    """Memory now; the peak counts from here (for a process: proc_pid_clear_refs(5))."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_bytes(device)


def main() -> None:
    folder, size, batch, micro, device, arm, *check = sys.argv[1:]
    place, pairs = Path(folder) / size, json.loads((Path(folder) / "pairs.json").read_text())[: int(batch)]
    known = Path(folder) / f"{size}-{batch}.safetensors"
    torch.set_num_threads(2)
    if arm == "reference":
        save_file(
            {name: value.contiguous() for name, value in reference(place, pairs, device).items()}, known
        )
        return
    cache = {"ours": "auto", "ours-cached": "always"}.get(arm)
    clip = 0.0 if check else CLIP
    work: Any = (
        Ours(place, pairs, int(micro), cache, clip)
        if cache
        else Peer(place, pairs, int(micro), device, arm, clip)
    )
    if check:
        print(json.dumps(error(gradients_of(work.model, work.step), load_file(known))), flush=True)
        return
    del pairs
    print(json.dumps({"ready_bytes": forget_peak(device)}), flush=True)
    for _ in sys.stdin:
        begin, before = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        loss = work.step()
        if device == "cuda":
            torch.cuda.synchronize()
        told = {
            "seconds": time.perf_counter() - begin,
            "cpu_s": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before,
            "peak_bytes": peak_bytes(device),
            "loss": loss,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
