"""The next product of a customer: `python benchmarks/recommend.py [jobs/configs/recommend_xmarket.yaml key=value ...]`.

Trains and judges the configuration by its job, unless that run is finished, and ranks the very same candidates of the
very same sessions by popularity and by item-kNN: an item's score is the sum of its cosines to the session's items over
the customers of the market (`kNN`) or of all markets (`kNN of all`), ties by popularity. Prints nDCG@10 per market and
writes `results/<run>.json`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import scipy.sparse as sp

from mlray import configuration, storage
from mlray.config import RunConfig
from mlray.corpus.sessions import items
from mlray.corpus.testsets import Case
from mlray.evaluation import ranking
from mlray.evaluation.evaluate import check
from mlray.evaluation.recommendation import Market

JOB = Path(__file__).resolve().parents[1] / "jobs" / "finetune.py"
Score = Callable[[str, list[str]], list[float]]
"""(session, candidates) -> score of each."""
CONFIG = "jobs/configs/recommend_xmarket.yaml"


def main() -> int:
    """Trains, computes what the others find, prints the table and writes the JSON."""
    path, *overrides = sys.argv[1:] or [CONFIG]
    config = configuration.load(path, overrides)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **os.environ}
    command = [sys.executable, str(JOB), "--config", path, *overrides]
    subprocess.run(command, check=True, env=environment)
    root = Path(storage.join(storage.absolute(config.run.storage_uri), config.run.name))
    ours = json.loads((root / "evaluation" / "report.json").read_text(encoding="utf-8"))
    training = json.loads((root / "report.json").read_text(encoding="utf-8"))
    rows, _ = check(config)
    found = ours["cells"][f"recommendation {config.evaluation.negatives}"]
    everyone = [case for group in rows.values() for case in group]
    pooled = neighbours(everyone) if len(rows) > 1 else None
    cells = {
        market: {"mlray": values(found[market]), **floors(rows[market], pooled, config)} for market in rows
    }
    body = {
        "command": f"python benchmarks/recommend.py {' '.join([path, *overrides])}",
        "machine": measure.machine(("torch", "transformers", "deepspeed", "scipy")),
        "training": {key: training[key] for key in ("steps", "parameters", "seconds_in_steps")},
        "cells": cells,
        "catalogue": ours["cells"]["catalogue"],
    }
    place = measure.write_json(config.run.name.replace("-", "_"), body)
    print(f"{render(cells)}\nfigures: {place.name}")
    return 0


def values(cell: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The figures of a market, and the interval (95 %) of the one that decides."""
    decides = cell["nDCG@10"]
    about = {"nDCG@10 interval": [decides["low"], decides["high"]], "n": decides["n"]}
    return {name: figure["value"] for name, figure in cell.items()} | about


def floors(own: list[Case], pooled: Score | None, config: RunConfig) -> dict[str, dict[str, float]]:
    """What is found without a model."""
    popular = Counter(item for case in own for item in items(case.text))
    scores = {"kNN": neighbours(own)} | ({"kNN of all": pooled} if pooled else {})
    found: dict[str, list[str]] = {"popularity": [], **{name: [] for name in scores}}
    place = Market.of(own)
    for case in own:
        candidates = [place.names[i] for i in place.candidates(case, config.evaluation.negatives)]
        right, often = candidates[0], [popular[item] for item in candidates]
        found["popularity"].append(ordered(candidates, often, right))
        for name, score in scores.items():
            near = [
                value + 1e-9 * count for value, count in zip(score(case.text, candidates), often, strict=True)
            ]
            found[name].append(ordered(candidates, near, right))
    truths = [case.pair for case in own]
    return {
        name: {
            metric: figure.value for metric, figure in ranking.score(predicted, truths, resamples=2).items()
        }
        for name, predicted in found.items()
    }


def ordered(candidates: list[str], scores: list[float], right: str) -> str:
    """Candidates by falling score, the right one behind its equals."""
    pairs = sorted(
        zip(candidates, scores, strict=True), key=lambda pair: (-pair[1], pair[0] == right, pair[0])
    )
    return " ".join(name for name, _ in pairs)


def neighbours(cases: list[Case]) -> Score:
    """(session, candidates) -> sum of the cosines of each candidate to the items of the session."""
    sessions = [sorted(set(items(case.text))) for case in cases]
    names = {item: number for number, item in enumerate(sorted({one for own in sessions for one in own}))}
    rows = np.repeat(np.arange(len(sessions)), [len(own) for own in sessions])
    columns = np.array([names[item] for own in sessions for item in own])
    seen = sp.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(sessions), len(names)))
    scale = sp.diags(1.0 / np.sqrt(np.asarray(seen.sum(axis=0)).ravel()))
    cosines = (scale @ (seen.T @ seen) @ scale).tolil()
    cosines.setdiag(0)
    cosines = cosines.tocsr()

    def score(session: str, candidates: list[str]) -> list[float]:
        own = [names[item] for item in set(items(session))]
        near = np.asarray(cosines[own].sum(axis=0)).ravel()
        return [float(near[names[item]]) if item in names else 0.0 for item in candidates]

    return score


def render(cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each market."""
    arms = [arm for arm in ("mlray", "kNN", "kNN of all", "popularity") if arm in next(iter(cells.values()))]
    rows = [
        [market, *(f"{own[arm]['nDCG@10']:.1f}" for arm in arms), f"{own['mlray']['n']:,.0f}"]
        for market, own in sorted(cells.items())
    ]
    means = [f"{np.mean([own[arm]['nDCG@10'] for own in cells.values()]):.1f}" for arm in arms]
    return measure.table(("market", *arms, "n"), [*rows, ["mean", *means, ""]])


if __name__ == "__main__":
    sys.exit(main())
