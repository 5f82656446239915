"""Forward and backward pass of a translator on a CPU: threads or processes, with and without freed memory kept.

    python benchmarks/cpu_workers.py

A global batch of 64 packed rows is computed by one process of two threads or by two processes of one thread with half
of the rows each, in alternating order; the slower process counts. Without communication: what the batch costs at least.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measure

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "multi30k"
ROWS, COLUMNS = 64, 64
PASSES, WARM = 12, 2
ARMS = {
    "one process, two threads": (1, 2, False),
    "one process, two threads, freed memory kept": (1, 2, True),
    "two processes, one thread": (2, 1, False),
    "two processes, one thread, freed memory kept": (2, 1, True),
}


def work(rows: int, threads: int, *, keep: bool) -> dict[str, float]:
    """Median seconds of a pass in this process, and target tokens in it."""
    import torch

    from mlray.config import Model, Objective, Tokenizer
    from mlray.corpus import packing
    from mlray.corpus.windows import Window
    from mlray.models import tokenizer, translator
    from mlray.objectives import translation
    from mlray.training import fit

    if keep:
        fit.keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    english, german = (lines(f"train.{language}.gz") for language in ("en", "de"))
    settings = Tokenizer(algorithm="bpe", vocab_size=6000, character_coverage=1.0)
    tokens = tokenizer.train(english + german, settings, ["de", "en"])
    cut = translation.pairs(tokenizer.encoder(tokens), ["en-de"], COLUMNS)
    count = len(english)
    table = packing.pack(Window(0, english, german, [0] * count, list(range(count))), cut, COLUMNS, 0)
    sizes: dict[str, Any] = {"hidden_size": 192, "num_layers": 4, "num_heads": 4, "intermediate_size": 384}
    model = translator.build(
        Model(family="m2m_100", dropout=0.15, attention_dropout=0.0, max_positions=128, **sizes), tokens
    ).train()
    vocabulary, objective = tokenizer.vocabulary(tokens), Objective(name="translation")
    seconds, targets = [], []
    for number in range(WARM + PASSES):
        batch = packing.unpack(table.slice(number % 8 * rows, rows))
        inputs, wanted = translation.collate(batch, vocabulary)
        begin = time.perf_counter()
        translation.loss(model(**inputs), torch.from_numpy(wanted), objective).backward()
        seconds.append(time.perf_counter() - begin)
        targets.append(len(wanted))
        model.zero_grad()
    return {"seconds": statistics.median(seconds[WARM:]), "targets": statistics.mean(targets[WARM:])}


def lines(name: str) -> list[str]:
    """The first 4,000 sentences of a file."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line, _ in zip(file, range(4000), strict=False)]


def run(processes: int, threads: int, *, keep: bool) -> dict[str, float]:
    """Seconds of the slowest of the processes, and target tokens a second of all of them."""
    command = [sys.executable, __file__, "--rows", str(ROWS // processes), "--threads", str(threads)]
    started = [
        subprocess.Popen([*command, *(["--keep"] if keep else [])], stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("an arm failed; its error stands above")
    found = [json.loads(text) for text in said]
    slowest = max(one["seconds"] for one in found)
    return {"seconds": slowest, "targets_per_s": sum(one["targets"] for one in found) / slowest}


def main() -> None:
    """Runs the arms, prints a table and keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)  # of an arm's own process
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows:
        print(json.dumps(work(arguments.rows, arguments.threads, keep=arguments.keep)))
        return
    arms = {name: lambda arm=arm: run(arm[0], arm[1], keep=arm[2]) for name, arm in ARMS.items()}
    samples = measure.alternate(arms, rounds=arguments.rounds)
    for name, found in samples.items():
        seconds = [one["seconds"] for one in found]
        speed = statistics.median(one["targets_per_s"] for one in found)
        print(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) | {speed:,.0f} |"
        )
    measure.write_json(
        "cpu_workers", {"machine": measure.machine(["torch", "transformers"]), "arms": samples}
    )


if __name__ == "__main__":
    main()
