"""A contrastive step with a large batch: ours beside sentence-transformers, on the same pairs and weights.

    python benchmarks/contrastive.py [--batches 1024 8192] [--tiny 65536] [--rounds 5]
    python benchmarks/contrastive.py --device cuda --micro 512 --batches --minilm 1024 8192

Pairs of sentences with English (`../shared/data/opus_tatoeba`, or `--data`) are tokenised once. Each arm (see
`contrastive_arms.py`) makes the same optimiser step, without dropout, from the same weights of an XLM-R type encoder,
in a process of its own, two threads each:

ours             packed texts without padding; chunks whose activations fit keep their graph
ours-cached      the same, every chunk but the first read twice (`contrastive.cache=always`): memory that stays flat
st-cached        `CachedMultipleNegativesRankingLoss`, as many pairs a chunk as ours
st-cached-tokens the same with `mini_batch_num_tokens`, which lets it form chunks by length
st               `MultipleNegativesRankingLoss`, the whole batch in one pass, where that fits

First every arm gives the gradient of its first step, which is compared with that in float64. Then the timed rounds,
in alternating order, a step each after one to warm up. Memory is the peak of the process, and how much of that lies
above what it holds when it is ready (model and tokenised batch); on a GPU it is what tensors take there. Figures go to
`results/contrastive.json` (`contrastive_cuda.json`) and to the terminal; ratios are ours over theirs, round by round,
that of `ours` and that of `ours-cached`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measure
import torch

from mlray.config import Contrastive, Model, Tokenizer
from mlray.models import embedder, tokenizer

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "opus_tatoeba"
PACKAGES = ("torch", "transformers", "sentence-transformers", "deepspeed", "numpy")
ARMS = ("ours", "ours-cached", "st-cached", "st-cached-tokens", "st")
LARGEST_AT_ONCE = 1024
"""Pairs that `st` reads in one pass."""
SIZES = {
    "small": {"hidden_size": 192, "num_layers": 3, "num_heads": 4, "intermediate_size": 768},
    "minilm": {"hidden_size": 384, "num_layers": 12, "num_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64},
}


def main() -> int:
    arguments = parse()
    if not arguments.data.is_dir():
        print(
            f"no data at {arguments.data}; name the folder of <a>-<b>.tsv.gz files with --data",
            file=sys.stderr,
        )
        return 2
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")
    if arguments.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    title = "contrastive" if arguments.device == "cpu" else "contrastive_cuda"
    report: dict[str, Any] = {
        "machine": measure.machine(PACKAGES),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "micro_batch_size": arguments.micro,
        "batches": {},
    }
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="contrastive-") as name:
        folder = Path(name)
        write(arguments, folder)
        wanted = {"small": arguments.batches, "minilm": arguments.minilm, "tiny": arguments.tiny}
        for size, batch in [(size, batch) for size, batches in wanted.items() for batch in batches]:
            report["batches"][f"{size} {batch}"] = run(size, batch, arguments, folder)
            measure.write_json(title, report, arguments.results)  # hours: nothing that is measured is lost
    report["machine"]["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    report["seconds"] = round(time.perf_counter() - begin)
    path = measure.write_json(title, report, arguments.results)
    print(f"{render(report)}\nfigures: {path.name}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of <a>-<b>.tsv.gz files")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1024, 8192], help="pairs, with the small model"
    )
    parser.add_argument(
        "--tiny", type=int, nargs="*", default=[1024, 8192, 65536], help="pairs, with the tiny model"
    )
    parser.add_argument(
        "--minilm", type=int, nargs="*", default=[], help="pairs, with 12 layers of 384 (for a GPU)"
    )
    parser.add_argument("--micro", type=int, default=64, help="pairs of a chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    return parser.parse_args()


def write(arguments: argparse.Namespace, folder: Path) -> None:
    """The pairs, mixed, and a model of each size."""
    files = sorted(arguments.data.glob("*en*.tsv.gz"))
    lines = [gzip.decompress(path.read_bytes()).decode().splitlines() for path in files]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*lines))
    # Copies of a text would be masked by ours and not by the peer: each stands once.
    seen: set[str] = set()
    pairs = [line.split("\t") for line in turns if line]
    pairs = [pair for pair in pairs if not (seen & set(pair)) and not seen.update(pair)]
    wanted = max([*arguments.batches, *arguments.minilm, *arguments.tiny])
    if len(pairs) < wanted:
        raise SystemExit(f"{arguments.data} has {len(pairs)} pairs, fewer than the batch of {wanted}")
    (folder / "pairs.json").write_text(json.dumps(pairs[:wanted]), encoding="utf-8")
    texts = [text for pair in pairs[:30_000] for text in pair]
    tokens = tokenizer.train(texts, Tokenizer(vocab_size=16_000))
    for name, sizes in SIZES.items():
        torch.manual_seed(0)
        config = Model.model_validate({"max_positions": 128, "dropout": 0.0, **sizes})
        network = embedder.build(config, Contrastive(), tokens, None)
        embedder.export(network, tokens, dict(network.named_parameters()), folder / name)


def run(size: str, batch: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of every arm at one batch size."""
    names = [name for name in arguments.arms if name != "st" or batch <= LARGEST_AT_ONCE]
    command = (
        sys.executable,
        str(HERE / "contrastive_arms.py"),
        str(folder),
        size,
        str(batch),
        str(arguments.micro),
        arguments.device,
    )
    found: dict[str, Any] = {}
    ask([*command, "reference"])
    # A GPU has room for all at once; on a CPU they would only wait for each other.
    with ThreadPoolExecutor(len(names) if arguments.device == "cuda" else 1) as pool:
        told = pool.map(lambda name: ask([*command, name, "check"]).splitlines()[-1], names)
        errors = {name: float(json.loads(line)) for name, line in zip(names, told, strict=True)}
    with contextlib.ExitStack() as stack:
        arms = {
            name: stack.enter_context(measure.Arm([*command, name], folder / f"{name}.log")) for name in names
        }
        for name, arm in arms.items():
            found[name] = arm.answer()
        samples = measure.alternate({name: arm.go for name, arm in arms.items()}, arguments.rounds + 1)
    for name, rounds in samples.items():
        timed = rounds[1:]
        found[name] |= {
            "gradient_error": errors[name],
            "losses": [one["loss"] for one in timed],
            "pairs_per_s": measure.spread([batch / one["seconds"] for one in timed]),
            "cpu_s": measure.spread([one["cpu_s"] for one in timed]),
            "peak_mib": round(timed[-1]["peak_bytes"] / 2**20),
            "step_mib": round((timed[-1]["peak_bytes"] - found[name]["ready_bytes"]) / 2**20),
            **{
                f"{ours}_over_it": measure.ratio(
                    [1 / one["seconds"] for one in samples[ours][1:]], [1 / one["seconds"] for one in timed]
                )
                for ours in ("ours", "ours-cached")
                if ours in samples
            },
        }
    return found


def ask(command: list[str]) -> str:
    """What a process prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return done.stdout


def render(report: dict[str, Any]) -> str:
    """A table for each batch size."""
    tables = []
    for name, arms in report["batches"].items():
        rows = [
            (
                arm,
                str(one["pairs_per_s"]),
                *(str(one.get(f"{ours}_over_it", "-")) for ours in ("ours", "ours-cached")),
                str(one["cpu_s"]),
                f"{one['peak_mib']:,}",
                f"{one['step_mib']:,}",
                f"{one['gradient_error']:.1e}",
            )
            for arm, one in arms.items()
        ]
        ratios = ("ours / it", "ours-cached / it")
        header = (
            f"{name} pairs",
            "pairs/s",
            *ratios,
            "CPU s a step",
            "peak MiB",
            "of a step",
            "gradient error",
        )
        tables.append(measure.table(header, rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    sys.exit(main())
