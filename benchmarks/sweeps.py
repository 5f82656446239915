"""What finished sweeps found and cost: `python benchmarks/sweeps.py runs/sweep-tatoeba "how it was begun"`.

Keeps every validation of every trial as `results/<sweep>.json`, and prints what `benchmarks/README.md` shows: trials
that stopped early, clones with their first step and whether their donor's checkpoint is still whole, the Pareto set,
the winner, and steps beside those of the full grid.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import measure

from mlray import configuration
from mlray.config import Storage
from mlray.training import checkpoint
from mlray.training.folders import WINNER
from mlray.tuning.board import Board
from mlray.tuning.trial import TRIALS

_LASTING = {"cpu", "cores", "memory_gb", "system", "versions"}
"""Of the machine: load, date and commit of now are not those of the sweep."""
PACKAGES = ("ray", "optuna", "torch", "peft", "transformers")


def main(folder: Path, command: str) -> None:
    """Writes the JSON and prints the figures."""
    config = configuration.parse((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    board = Board(config.run.name, config, ())
    board.over = True
    board.restore(json.loads((folder / TRIALS).read_text(encoding="utf-8")))
    made, without, grid = board.spent()
    winner = json.loads((folder / WINNER).read_text(encoding="utf-8"))
    judged = folder / winner["run"] / "evaluation" / "report.json"
    body: dict[str, Any] = {
        "command": command,
        "date": date.fromtimestamp((folder / WINNER).stat().st_mtime).isoformat(),
        "machine": {key: value for key, value in measure.machine(PACKAGES).items() if key in _LASTING},
        "sweep": config.sweep.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
        "steps": {"made": made, "without_stopping": without, "grid": grid},
        "stopped": sorted(name for name, state in board.states.items() if state == "stopped"),
        "clones": clones(board),
        "pareto": sorted(board.pareto()),
        "winner": winner,
        "evaluation": json.loads(judged.read_text(encoding="utf-8")),
        **board.state(),
    }
    text = json.dumps(body, ensure_ascii=False, indent=1).replace(str(folder.resolve().parent), "runs")
    path = measure.RESULTS / f"{config.run.name.replace('-', '_')}.json"
    path.write_text(text.replace(f"{Path.cwd()}/", "") + "\n", encoding="utf-8")
    print(f"{board.heading()}\n")
    print(measure.table(*board.leaders()))
    for one in body["clones"]:
        whole = "whole" if one["donor_whole"] else "gone"
        steps = f"first step {one['first_step']}, first validation {one['first_validation']}"
        print(f"{one['run']}: {steps}, from {one['donor']}, which is {whole}")
    print(f"\nwinner {winner['run']}; Pareto set: {', '.join(body['pareto'])}; figures: {path.name}")


def clones(board: Board) -> list[dict[str, Any]]:
    """Runs that went on from another trial's checkpoint, by what they have reported themselves.

    A clone that had begun anew would have its first validation after the first stretch, not after its donor's step; and
    whether that checkpoint is there and whole now.
    """
    every, found = board.config.train.validate_every, []
    for run in dict.fromkeys(row.run for row in board.rows if row.cloned_from):
        own = [row for row in board.rows if row.run == run]
        donor = own[0].cloned_from
        found.append(
            {
                "run": run,
                "donor": "/".join(donor.split("/")[-3:]),
                "donor_step": int(donor.rpartition("-")[2]),
                "first_validation": own[0].step,
                "first_step": own[0].step - every + 1,
                "donor_whole": checkpoint.verify(donor, Storage()) is None,
            }
        )
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
