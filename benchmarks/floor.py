"""What retrieval finds without a model: `python benchmarks/floor.py jobs/configs/align_tatoeba.yaml`.

Nearest neighbour by the cosine of tf-idf over character 2- to 4-grams, on the very rows, directions and measures of the
evaluation of a configuration. Prints the table, and keeps it as `results/floor_<run>.json`, where
`benchmarks/tasks.py` looks for it.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
from rich.progress import track
from sklearn.feature_extraction.text import TfidfVectorizer

from mlray import configuration
from mlray.corpus.testsets import Case
from mlray.evaluation import ranking, retrieval
from mlray.evaluation.evaluate import check

RESULTS = Path(__file__).parent / "results"
GRAMS = {"analyzer": "char_wb", "ngram_range": (2, 4), "sublinear_tf": True}


def main(path: str, overrides: list[str]) -> None:
    """Measures each direction, prints the table and writes the JSON."""
    config = configuration.load(path, overrides)
    rows, _ = check(config)
    begin = time.monotonic()
    cells = {}
    for name, group in track(rows.items(), "directions", transient=True):
        found = ranking.score(nearest(group), retrieval.truths(group), resamples=1)
        cells[name] = {metric: {"value": figure.value, "n": figure.n} for metric, figure in found.items()}
    body = {
        "command": f"python benchmarks/floor.py {' '.join([path, *overrides])}",
        "date": date.today().isoformat(),
        "seconds": round(time.monotonic() - begin, 1),
        "vectorizer": GRAMS,
        "cells": cells,
    }
    place = RESULTS / f"floor_{config.run.name.replace('-', '_')}.json"
    place.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print("| direction | R@1 | accuracy | MRR | n |\n|---|---|---|---|---|")
    for name, figures in cells.items():
        shown = " | ".join(f"{figures[metric]['value']:.1f}" for metric in ("R@1", "accuracy", "MRR"))
        print(f"| {name} | {shown} | {figures['R@1']['n']:,} |")
    print(f"| mean | {np.mean([figures['R@1']['value'] for figures in cells.values()]):.1f} | | | |")


def nearest(group: list[Case]) -> list[str]:
    """Of each query the numbers of the nearest candidates, the nearest first."""
    pool = list(retrieval.candidates(group))
    grams = TfidfVectorizer(**GRAMS).fit([*pool, *(case.text for case in group)])
    products_QC = (grams.transform([case.text for case in group]) @ grams.transform(pool).T).toarray()
    return [" ".join(map(str, np.argsort(-row, kind="stable")[: ranking.DEPTH])) for row in products_QC]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
