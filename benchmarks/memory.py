"""Peak memory of the driver, the input pipeline and a worker while the corpus grows from 20 to 200 MB.

    python benchmarks/memory.py

Distinct lines (real sentences with a running number) in eight languages are written as parquet, once 20 and once
200 MB; the job pre-trains a small encoder for the same number of steps on each, in a Ray cluster of its own. Every
half second the resident memory of each process of the job is read; the table gives each kind's largest process.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import measure
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("ar", "de", "en", "es", "fr", "ja", "ru", "zh")
KINDS = {
    "driver": "jobs/pretrain.py",
    "train worker": "ray::RayTrainWorker",
    "reader": "_ReadWindows",
    "packer": "_PackWindows",
    "scan task": "MapBatches(read)",
    "coordinator": "ray::SplitCoordinator",
}


def main() -> int:
    """Parses, runs both sizes and writes `results/memory.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mono")
    parser.add_argument("--megabytes", type=int, nargs=2, default=(20, 200))
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    table = {}
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(prefix="mlray-") as folder:
            size = write(arguments.data, Path(folder) / "text", megabytes * 1_000_000)
            peaks, seconds = run(Path(folder), arguments.steps)
        table[f"{megabytes} MB"] = {"bytes": size, "seconds": seconds, "peak_mib": peaks}
        print(json.dumps(table[f"{megabytes} MB"]))
    first, last = (table[f"{megabytes} MB"]["peak_mib"] for megabytes in arguments.megabytes)
    print(
        f"| process | {arguments.megabytes[0]} MB | {arguments.megabytes[1]} MB | ratio |\n|---|---|---|---|"
    )
    for kind in KINDS:
        if kind in first and kind in last:
            print(
                f"| {kind} | {first[kind]:.0f} MiB | {last[kind]:.0f} MiB | {last[kind] / first[kind]:.2f} |"
            )
    machine = measure.machine(("ray", "torch", "deepspeed", "pyarrow"))
    measure.write_json("memory", {"machine": machine, "steps": arguments.steps, "sizes": table})
    return 0


def write(data: Path, folder: Path, size: int) -> int:
    """Writes about `size` bytes of distinct lines, an eighth in each language; returns the bytes of text."""
    total = 0
    for language in LANGUAGES:
        target = folder / f"lang={language}"
        target.mkdir(parents=True)
        for part, lines in enumerate(pieces(data / f"{language}.txt.gz", size // len(LANGUAGES))):
            total += sum(len(line.encode()) for line in lines)
            pq.write_table(pa.table({"text": lines}), target / f"part-{part}.parquet", row_group_size=20_000)
    return total


def pieces(path: Path, size: int, file_bytes: int = 5_000_000) -> Iterator[list[str]]:
    """Lines of a file over and over, each with its number, in lists of about `file_bytes`."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    batch: list[str] = []
    held = done = 0
    for number, line in enumerate(itertools.cycle(lines)):
        batch.append(f"{line} {number}")
        held += len(batch[-1].encode())
        if held >= file_bytes or done + held >= size:
            yield batch
            done, held, batch = done + held, 0, []
        if done >= size:
            return


def run(folder: Path, steps: int) -> tuple[dict[str, float], float]:
    """Runs the job and watches its processes: the largest of each kind in MiB, and the wall seconds."""
    command = [
        *(sys.executable, "jobs/pretrain.py", "--config", "jobs/configs/pretrain_small.yaml"),
        f"corpus.sources=[{{uri: {folder / 'text'}, language: partition}}]",
        *(f"run.storage_uri={folder / 'runs'}", f"train.steps={steps}", "train.validate_every=1000"),
        *("tokenizer.vocab_size=8000", "train.micro_batch_size=8"),
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment.pop("RAY_ADDRESS", None)
    peaks: dict[str, float] = {}
    begin = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as job:
        family = psutil.Process(job.pid)
        while job.poll() is None:
            watch(family, peaks)
            time.sleep(0.5)
    if job.returncode:
        raise SystemExit(f"the job failed with exit code {job.returncode}")
    return peaks, time.monotonic() - begin


def watch(family: psutil.Process, peaks: dict[str, float]) -> None:
    """Notes the memory of every process of the job: resident less what it shares with the object store."""
    try:
        processes = [family, *family.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            name = " ".join(process.cmdline())
            memory = process.memory_info()
        except psutil.Error:
            continue
        kind = next((kind for kind, mark in KINDS.items() if mark in name), None)
        if kind is not None:
            peaks[kind] = max(peaks.get(kind, 0.0), (memory.rss - memory.shared) / 2**20)


if __name__ == "__main__":
    sys.exit(main())
