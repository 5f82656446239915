"""Requests of six languages with an adapter each: one forward pass beside one for each adapter.

    python benchmarks/mixed_adapters.py --model WEIGHTS [--texts 32] [--tokens 16] [--adapters 6] [--rounds 30]

Ray Serve's batching splits a batch by the model that a request asks for (`serve.multiplexed`), so each adapter has a
forward pass of its own. Both arms read the same texts with the same adapters on the encoder at WEIGHTS, in
alternating order; the adapters are fresh LoRAs of rank 8 with weights drawn at random, as time does not depend on
them. Before, the vectors of both arms are compared with those of each adapter alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np

_SAME = 1e-5
PACKAGES = ("torch", "peft", "transformers")


def main() -> int:
    arguments = parse()
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS=str(arguments.threads))
    with tempfile.TemporaryDirectory(prefix="mixed-") as folder:
        embedder, alone, cut = prepare(arguments, Path(folder))
        names = list(alone)
        asked = [names[i % len(names)] for i in range(len(cut))]
        width = embedder.read(cut[:1]).shape[1]

        def mixed() -> np.ndarray:
            return embedder.read(cut, asked)

        def split() -> np.ndarray:
            found = np.empty((len(cut), width), np.float32)
            for name in names:
                own = [i for i, one in enumerate(asked) if one == name]
                found[own] = alone[name].read([cut[i] for i in own])
            return found

        serial = np.concatenate([alone[name].read([one]) for name, one in zip(asked, cut, strict=True)])
        error = float(np.abs(mixed() - serial).max())
        if error > _SAME:
            raise SystemExit(
                f"one pass gives other vectors than each adapter alone ({error:.1e}): no speed counts"
            )
        samples = measure.alternate({"mixed": timed(mixed), "split": timed(split)}, arguments.rounds)
    per_s = {name: [len(cut) / one["seconds"] for one in rounds] for name, rounds in samples.items()}
    report = {
        "machine": measure.machine(PACKAGES),
        "texts": len(cut),
        "tokens": len(cut[0]),
        "adapters": len(names),
        "threads": arguments.threads,
        "largest_error": error,
        "texts_per_s": {name: measure.spread(values) for name, values in per_s.items()},
        "mixed_over_split": measure.ratio(per_s["mixed"], per_s["split"]),
    }
    path = measure.write_json("mixed_adapters", report, arguments.results)
    rows = [(name, str(measure.spread(values))) for name, values in per_s.items()]
    print(measure.table(("arm", "texts/s"), rows))
    print(f"mixed / split: {report['mixed_over_split']}; largest error {error:.1e}\nfigures: {path.name}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mixed adapters in one pass, beside a pass for each.")
    parser.add_argument("--model", required=True, help="weights of an encoder with layers")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Any, dict[str, Any], list[list[int]]]:
    """An encoder with all adapters, one for each adapter alone, and texts of so many random tokens."""
    import torch

    from mlray.config import Adapter, Contrastive, RunConfig, Storage
    from mlray.models import adapters, embedder, tokenizer
    from mlray.objectives.embedding import TextEmbedder

    torch.set_num_threads(arguments.threads)
    known = embedder.checkpoint_of(RunConfig().model, arguments.model, Storage())
    tokens = tokenizer.load(arguments.model)
    names = [f"adapter{i}" for i in range(arguments.adapters)]
    for name in names:
        network = embedder.build(known, Contrastive(), tokens, arguments.model)
        digest = adapters.digest(network)
        wrapped = adapters.add(network, Adapter(kind="lora"))
        moving = {key: one.detach() for key, one in network.named_parameters() if one.requires_grad}
        for one in moving.values():
            one += 0.02 * torch.randn_like(one)
        adapters.export(wrapped, digest, "contrastive", tokens, moving, folder / name)
    config = RunConfig().model_copy(update={"model": known})
    found = TextEmbedder(config, arguments.model)
    for name in names:
        found.load(name, folder / name)
    alone = {name: TextEmbedder(config, arguments.model, folder / name) for name in names}
    drawn = (
        np.random.default_rng(0).integers(10, len(tokens), (arguments.texts, arguments.tokens - 2)).tolist()
    )
    start, end = found.encoder.start_id, found.encoder.end_id
    return found, alone, [[start, *one, end] for one in drawn]


def timed(work: Callable[[], object]) -> Callable[[], measure.Result]:
    """Seconds of a call."""

    def call() -> measure.Result:
        begin = time.perf_counter()
        work()
        return {"seconds": time.perf_counter() - begin}

    return call


if __name__ == "__main__":
    sys.exit(main())
