"""The pre-training step: ours against the Hugging Face Trainer and accelerate, on the same text and weights.

    python benchmarks/mlm_step.py [--precision fp32] [--rounds 5] [--steps 50] [--rows 3]
    python benchmarks/mlm_step.py --device cuda --rows 128 tokenizer.vocab_size=64000 \
        model.hidden_size=768 model.num_layers=12 model.num_heads=12 model.intermediate_size=3072

Sentences in 16 languages (`../shared/data/mono`, or `--data`), as many of each, are tokenised once. Every
arm (see `mlm_arms.py`) trains the same XLM-R type encoder from the same weights on the same documents, with
the same AdamW, clipping, rate and dropout, in a process of its own:

trainer          `transformers.Trainer`, `DataCollatorForLanguageModeling`: padding to the longest of a batch
trainer-grouped  the same with batches of documents of like length
trainer-concat   the same on full rows of documents that see each other (run_mlm.py's default)
accelerate       the loop of accelerate's documentation with the collator of the Trainer
ours             packed rows, a head on masked positions only, `mlray.training.engine` and `loop`, without Ray
-bf16, -compile  variants; with `--device cuda` compiled Trainer arms run too

First a check: on the same masked documents, packed rows with the masked-only head give the loss and the
gradient of padded documents with the full head. Then some steps to warm up, and the timed rounds in
alternating order. A step is an optimiser step; a peer's takes as many documents as the rows of ours hold.
Rounds of 50 steps are alike for all arms, because the Trainer sorts by length inside blocks of 50 batches.

Tokens are real ones (special ones included, padding not), memory is the peak of resident memory of an arm's
process. FLOPs are those that learning needs (real tokens, attention inside documents, the head on masked
tokens), so that utilisation, their rate over the measured peak of a matrix product, compares the arms. The
held-out loss after each round, on the same masks for all, shows that the arms learn alike; the process ends
with 1 where they do not. Figures go to `results/mlm_step.json` and, as a table, to the terminal; ratios are
ours over theirs, round by round.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import mlm_report
import mlm_work
import torch

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "mono"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "tokenizers", "numpy")
LANGUAGES = ("ar", "cs", "de", "en", "es", "fi", "fr", "hi", "it", "ja", "pl", "pt", "ru", "sv", "tr", "zh")
PEERS = ("trainer", "trainer-grouped", "trainer-concat", "accelerate")
COMPILED = ("trainer-compile", "trainer-concat-compile")


def main() -> int:
    arguments = parse()
    if not arguments.data.is_dir():
        print(
            f"no data at {arguments.data}; name the folder of <lang>.txt.gz files with --data",
            file=sys.stderr,
        )
        return 2
    prepare_process(arguments)
    begin = time.perf_counter()
    report: dict[str, Any] = {"machine": measure.machine(PACKAGES)}
    with tempfile.TemporaryDirectory(prefix="mlm-") as name:
        folder = Path(name)
        report["work"] = mlm_work.write(arguments, folder)
        report["equal"] = mlm_work.check_equal(folder)
        report["gemm_gflops"] = gemm_peaks(arguments.device)
        samples = run_rounds(arguments, report["work"]["documents_per_step"], folder)
    report["machine"]["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    report["seconds"] = round(time.perf_counter() - begin)
    report |= mlm_report.figures(samples, report)
    path = measure.write_json("mlm_step", report, arguments.results)
    print(mlm_report.render(report), f"\nfigures: {path.name}")
    return 0 if all(entry["alike"] for entry in report["learning"].values()) else 1


def prepare_process(arguments: argparse.Namespace) -> None:
    """What the arms inherit."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(arguments.threads))
    if arguments.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    torch.set_num_threads(arguments.threads)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of <lang>.txt.gz files")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES))
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="fp32")
    parser.add_argument("--arms", nargs="+", help="exactly these arms, e.g. ours trainer-grouped-bf16")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument(
        "--steps", type=int, default=50, help="optimiser steps of a round; see mlm_work.BLOCK"
    )
    parser.add_argument("--rows", type=int, default=3, help="packed rows of a step of ours")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all arms")
    arguments = parser.parse_args()
    arguments.arms = arguments.arms or default_arms(arguments)
    for arm in arguments.arms:
        name, *flags = arm.split("-")
        if name not in mlm_work.FLAGS or not mlm_work.FLAGS[name].issuperset(flags):
            parser.error(f"no arm {arm}")
    return arguments


def default_arms(arguments: argparse.Namespace) -> list[str]:
    """Full precision with every peer; bf16 with the Trainer (every peer where it is the only precision)."""
    peers = PEERS + (COMPILED if arguments.device == "cuda" else ())
    if arguments.precision == "fp32":
        return [*peers, "ours"]
    if arguments.precision == "bf16":
        return [f"{name}-bf16" for name in (*peers, "ours")]
    few = ("trainer", *(COMPILED if arguments.device == "cuda" else ()), "ours")
    return [*peers, "ours", *(f"{name}-bf16" for name in few)]


def gemm_peaks(device: str) -> dict[str, float]:
    """GFLOP/s of the fastest of some square products in each precision."""
    sizes = (4096, 8192) if device == "cuda" else (1024, 2048, 3072)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {name: max(gemm_rate(size, kind, device) for size in sizes) for name, kind in kinds.items()}


def gemm_rate(size: int, kind: torch.dtype, device: str, repeats: int = 5) -> float:
    """Best of `repeats`; the first call, which packs and allocates, is not counted."""
    left, right = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    product = torch.mm(left, right)
    seconds = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        torch.mm(left, right, out=product)
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds) / 1e9


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def arm(name: str, arguments: argparse.Namespace, documents: int, folder: Path) -> measure.Arm:
    """The process of an arm."""
    command = [
        *(sys.executable, str(HERE / "mlm_arms.py"), str(folder), name, f"--device={arguments.device}"),
        *(f"--documents={documents}", f"--steps={arguments.steps}"),
        f"--rounds={arguments.rounds}",
    ]
    return measure.Arm(command, folder / f"{name}.log")


def run_rounds(
    arguments: argparse.Namespace, documents: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Starts all arms, then lets one after another train a round; the first round (kept first) warms up."""
    with contextlib.ExitStack() as stack:
        arms = {name: stack.enter_context(arm(name, arguments, documents, folder)) for name in arguments.arms}
        for one in arms.values():
            one.answer()
        return measure.alternate({name: one.go for name, one in arms.items()}, arguments.rounds + 1)


if __name__ == "__main__":
    sys.exit(main())
