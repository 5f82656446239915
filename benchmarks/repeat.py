"""Repeats the beginning of a recorded run, and compares it with the record number by number.

    python benchmarks/repeat.py jobs/finetune.py jobs/configs/translate_multi30k.yaml results/translate_multi30k.json \
        [--step 500] [key=value ...]

Runs that take an hour are not made again for every commit. Their losses depend on everything that training does. So
this runs the very configuration until the checkpoint of `--step`, stops it there, and holds all losses and held-out
figures up to it against those of the record. Exit code 1 if one is another. Needs a processor of the same kind as the
record's: another rounds otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

_POLL_S = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Repeat the beginning of a recorded run.")
    parser.add_argument("job", help="such as jobs/finetune.py")
    parser.add_argument("config", type=Path, help="of the run")
    parser.add_argument("record", type=Path, help="JSON of benchmarks/tasks.py")
    parser.add_argument("--step", type=int, default=500, help="of a checkpoint")
    parser.add_argument("overrides", nargs="*", help="key=value: where this machine keeps runs and models")
    arguments = parser.parse_intermixed_args()
    record = json.loads(arguments.record.read_text(encoding="utf-8"))["training"]
    begin = time.monotonic()
    found = repeated(arguments)
    same, others = compared(found, record, arguments.step)
    told = f"{arguments.config.stem}: {same} figures up to step {arguments.step}, {time.monotonic() - begin:.0f} s"
    print(f"{told}; {'all equal to the last bit' if not others else f'{len(others)} others: {others[:3]}'}")
    return 1 if others or not same else 0


def repeated(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the run has noted of itself at the checkpoint; the run is stopped there.

    Raises:
        RuntimeError: it has ended before, or its folder is there already.
    """
    section = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))["run"]
    name = section["name"] + "-again"
    told = dict(one.split("=", 1) for one in arguments.overrides)
    folder = Path(told.get("run.storage_uri", section.get("storage_uri", "runs"))) / name
    if folder.exists():  # its checkpoints are of another time
        raise RuntimeError(f"{folder} is there already; delete it first")
    place = folder / "checkpoints" / f"step-{arguments.step:08}"
    command = [sys.executable, arguments.job, "--config", str(arguments.config), f"run.name={name}"]
    run = subprocess.Popen([*command, *arguments.overrides], start_new_session=True)
    try:
        while not (place / "COMMIT.json").exists():
            if run.poll() is not None:
                raise RuntimeError(f"the run has ended with {run.returncode} before {place}")
            time.sleep(_POLL_S)
        found: dict[str, Any] = json.loads((place / "progress.json").read_text(encoding="utf-8"))
        return found
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGTERM)
            run.wait()


def compared(found: dict[str, Any], record: dict[str, Any], last: int) -> tuple[int, list[str]]:
    """How many figures are the same, and what is not; a record may hold fewer of the losses."""
    losses = {int(step): loss for step, loss, *_ in found["losses"]}
    tables = {one["step"]: one["languages"] for one in found["validations"]}
    pairs = [
        (f"loss of step {step}", loss, losses.get(step))
        for step, loss, *_ in record["losses"]
        if step <= last
    ]
    pairs += [
        (
            f"{language}, step {one['step']}: {metric}",
            value,
            tables.get(one["step"], {}).get(language, {}).get(metric),
        )
        for one in record["validations"]
        if one["step"] <= last
        for language, figures in one["languages"].items()
        for metric, value in figures.items()
    ]
    others = [f"{name} {now} instead of {before}" for name, before, now in pairs if now != before]
    return len(pairs) - len(others), others


if __name__ == "__main__":
    sys.exit(main())
