"""Two models on the same rows: paired tests, corrected over languages and metrics."""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlray import languages
from mlray.config import ConfigError, Storage
from mlray.evaluation import labels, ranking, significance, texts, translation
from mlray.evaluation.predictions import DEFAULT, Row, by_language, kind_of, mark_spans, read, tags

_MEANS: dict[str, tuple[str, Callable[[str, str], float]]] = {
    "answer": ("MRR", ranking.reciprocal_rank),
    "classification": ("accuracy", operator.eq),
    "retrieval": ("MRR", ranking.reciprocal_rank),
    "recommendation": ("MRR", ranking.reciprocal_rank),
}
"""Kind of task -> metric that is a mean over the rows, and what a row is worth (prediction, truth)."""


def metric_of(task: str, metrics: Collection[str]) -> str:
    """The metric of a task whose paired test is made first; that of tags is the one that the task's metrics hold."""
    kind = kind_of(task)
    if kind == "tagging":
        return _of_tags(spans=labels.SPAN_METRICS[0] in metrics)
    return _MEANS[kind][0] if kind in _MEANS else "BLEU"


def _of_tags(*, spans: bool) -> str:
    return (labels.SPAN_METRICS if spans else labels.WORD_METRICS)[0]


@dataclass(frozen=True)
class Difference:
    """Two models on the rows of one language; `p` is corrected for the number of tests (Holm)."""

    metric: str
    first: float
    second: float
    p: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Task, language and metric -> difference."""

    about: dict[str, Any]
    cells: dict[str, Difference]

    def to_json(self) -> str:
        """The whole comparison."""
        cells = {name: asdict(cell) for name, cell in self.cells.items()}
        return json.dumps({"about": self.about, "cells": cells}, ensure_ascii=False, indent=1)


def compare(
    first: str | Path,
    second: str | Path,
    settings: Storage = DEFAULT,
    trials: int = significance.TRIALS,
    *,
    for_gate: bool = False,
) -> Comparison:
    """Tests on each language whether the second file's model is another than the first's.

    With `for_gate` tasks and languages that only one of the files has are left out, and each task has one test, that of
    `metric_of`: every other would make a loss harder to confirm.

    Raises:
        ConfigError: as `read`, or the two do not hold the same rows.
        StorageError: as `read`.
    """
    a, b = read(first, settings), read(second, settings)
    groups_a, groups_b = by_language(a), by_language(b)
    if for_gate:
        both = groups_a.keys() & groups_b.keys()
        groups_a, groups_b = ({key: side[key] for key in sorted(both)} for side in (groups_a, groups_b))
    for key in groups_a | groups_b:
        _check_rows(key, (first, groups_a.get(key, [])), (second, groups_b.get(key, [])))
    spans = mark_spans([row for side in (groups_a, groups_b) for group in side.values() for row in group])
    found = {
        f"{task} {language} {cell.metric}": cell
        for (task, language), group in groups_a.items()
        for cell in itertools.islice(
            _differences(
                task, language, group, groups_b[task, language], trials, spans=spans.get(task, True)
            ),
            1 if for_gate else None,
        )
    }
    corrected = significance.holm({name: cell.p for name, cell in found.items()})
    cells = {name: Difference(**{**asdict(cell), "p": corrected[name]}) for name, cell in found.items()}
    about = {"first": str(first), "second": str(second), "trials": trials, "correction": "Holm"}
    return Comparison(about, cells)


def _check_rows(key: tuple[str, str], *sides: tuple[str | Path, Sequence[Row]]) -> None:
    """Refuses rows of a task and language (`key`) that are not the same in both files (name, rows)."""
    ((first, a), (second, b)), told = sides, ", ".join(key)
    if len(a) != len(b):
        raise ConfigError(
            f"{told}: {first} has {len(a)} rows and {second} {len(b)}; a paired test needs the same"
        )
    for one, other in zip(a, b, strict=True):
        if one.truth != other.truth or (one.text and other.text and one.text != other.text):
            raise ConfigError(f"{told}: {one.place} and {other.place} are different rows")


def _differences(
    task: str, language: str, first: Sequence[Row], second: Sequence[Row], trials: int, *, spans: bool
) -> Iterator[Difference]:
    kind = kind_of(task)
    if kind in _MEANS:
        metric, worth = _MEANS[kind]
        a, b = (
            np.array([float(worth(row.prediction, row.truth)) for row in side]) for side in (first, second)
        )
        yield _means(metric, a, b, trials)
        if kind == "classification":
            yield from _by_label(first, second, trials)
    elif kind == "tagging":
        a, b = (labels.span_counts(*tags(side), spans=spans) for side in (first, second))
        p = significance.paired(a, b, _f1, trials)
        yield Difference(_of_tags(spans=spans), 100 * _f1(a.sum(axis=0)), 100 * _f1(b.sum(axis=0)), p, len(a))
    else:
        yield from _written(languages.target(language), first, second, trials)


def _means(metric: str, first_N: np.ndarray, second_N: np.ndarray, trials: int) -> Difference:
    """A metric that is the mean of what each row is worth."""
    n = len(first_N)
    p = significance.paired(first_N[:, None], second_N[:, None], lambda sums: sums[..., 0] / n, trials)
    return Difference(metric, 100 * float(first_N.mean()), 100 * float(second_N.mean()), p, n)


def _by_label(first: Sequence[Row], second: Sequence[Row], trials: int) -> Iterator[Difference]:
    """Macro F1 and MCC, which no mean over the rows gives: a paired bootstrap (Efron and Tibshirani 1993).

    Both sides are resampled alike; p is the share of the resamples whose difference is as far from the real one as
    that is from none, the real one counted.
    """
    truth = [row.truth for row in first]
    (a, spread_a), (b, spread_b) = (
        labels.text_scores([row.prediction for row in side], truth, trials) for side in (first, second)
    )
    found = (np.abs(spread_b - spread_a - (b - a)) >= np.abs(b - a) - 1e-12).sum(axis=0)
    for i, metric in enumerate(labels.TEXT_METRICS):
        if metric != "accuracy":
            p = (1 + int(found[i])) / (1 + trials)
            yield Difference(metric, 100 * float(a[i]), 100 * float(b[i]), p, len(truth))


def _f1(sums: np.ndarray) -> Any:
    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1.0)


def _written(language: str, first: Sequence[Row], second: Sequence[Row], trials: int) -> Iterator[Difference]:
    """All metrics of texts that were written in a language."""
    references = [row.truth for row in first]
    sides = [[row.prediction for row in side] for side in (first, second)]
    for name, metric in translation.metrics(language, references).items():
        yield _corpus(name, metric, sides, references, trials)
    worths = [texts.worth(side, references, language) for side in sides]
    for i, name in enumerate(texts.METRICS):
        yield _means(name, worths[0][:, i], worths[1][:, i], trials)


def _corpus(
    name: str, metric: Any, sides: Sequence[Sequence[str]], references: Sequence[str], trials: int
) -> Difference:
    """One of sacreBLEU's metrics of swapped sentences.

    Its own paired test counts only trials that are beyond the real difference: it calls two equal systems different.
    """
    a, b = (
        np.array(metric._extract_corpus_statistics(side, [references]), dtype=np.float64) for side in sides
    )

    def score(sums: np.ndarray) -> np.ndarray:
        rows = np.rint(sums).astype(int).reshape(-1, sums.shape[-1])
        scores = [metric._compute_score_from_stats(row.tolist()).score for row in rows]
        return np.array(scores).reshape(sums.shape[:-1])

    p = significance.paired(a, b, score, trials)
    return Difference(name, float(score(a.sum(axis=0))), float(score(b.sum(axis=0))), p, len(references))


def show(comparison: Comparison, console: Console) -> None:
    """Prints a row for each language and metric."""
    table = Table(
        title=escape(f"{comparison.about['first']} and {comparison.about['second']}"), title_justify="left"
    )
    for heading in ("language", "metric", "first", "second", "difference", "p (Holm)", "n"):
        table.add_column(heading, justify="left" if heading in {"language", "metric"} else "right")
    for name, cell in comparison.cells.items():
        difference = f"{cell.second - cell.first:+.2f}"
        table.add_row(
            escape(name.removesuffix(f" {cell.metric}")),
            cell.metric,
            f"{cell.first:.2f}",
            f"{cell.second:.2f}",
            difference,
            f"{cell.p:.4f}",
            f"{cell.n:,}",
        )
    console.print(table)
