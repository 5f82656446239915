"""Scores of ready predictions, and paired comparisons of two models on the same rows.

A file holds a JSON object a line: `prediction`, `language`, and `reference` (a text) or `label` (of a text); with
`"task": "tagging"` both are tags with a space between, with `"task": "answer"` the numbers of sentences.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

from mlray import languages
from mlray.config import ConfigError, Evaluation
from mlray.evaluation import labels, significance, texts, translation
from mlray.evaluation.report import Figure, Report
from mlray.objectives.table import HEADS


class Case(NamedTuple):
    """A row of a test set."""

    text: str
    pair: str
    """The reference, the label, or the tags."""
    file: str
    row: int
    """In the file, from 0."""

    @property
    def place(self) -> str:
        """File and row, for an error's beginning."""
        return f"{self.file}: row {self.row}"


@dataclass(frozen=True)
class Row:
    """A prediction and what it should have been."""

    task: str
    language: str
    prediction: str
    truth: str
    place: str = ""
    """File and line or row, for an error's beginning."""


@dataclass(frozen=True)
class Difference:
    """Two models on the rows of one language; `p` is corrected for the number of languages (Holm)."""

    metric: str
    first: float
    second: float
    p: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """Task and language -> difference."""

    about: dict[str, Any]
    cells: dict[str, Difference]

    def to_json(self) -> str:
        """The whole comparison."""
        cells = {name: asdict(cell) for name, cell in self.cells.items()}
        return json.dumps({"about": self.about, "cells": cells}, ensure_ascii=False, indent=1)


def read(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ConfigError: it cannot be read, or a line is no row; file and line are named.
    """
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # texts may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the predictions {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            kind = "label" if "label" in entry else "reference"
            task = str(entry.get("task") or ("classification" if kind == "label" else "text"))
            said, truth = str(entry["prediction"]), str(entry[kind])
            rows.append(Row(task, str(entry["language"]), said, truth, f"{path}: line {number}"))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path}: line {number} needs prediction, language, and reference or label: {error}"
            ) from None
    if not rows:
        raise ConfigError(f"{path} holds no predictions")
    return rows


def score(path: Path, config: Evaluation) -> Report:
    """The report on ready predictions.

    Raises:
        ConfigError: as `read`, and for a row that cannot be scored.
    """
    report = Report({"predictions": str(path), "resamples": config.resamples})
    for (task, language), group in _groups(read(path)).items():
        table = report.cells.setdefault(task, {})
        table[language] = figures(task, language, group, config.resamples)
    for task, table in report.cells.items():
        own = _is_direction(task, next(iter(table)))
        others = {
            language
            for other, cells in report.cells.items()
            for language in cells
            if _is_direction(other, language) == own
        }
        report.empty[task] = dict.fromkeys(
            sorted(others - table.keys()), "no rows: the predictions hold this language for other tasks only"
        )
    return report


def _is_direction(task: str, language: str) -> bool:
    """Whether a language of a task is a direction of translation; labels have none, and `de-ba` is a dialect there."""
    return languages.is_direction(language) and task.partition(" ")[0] not in HEADS


def figures(task: str, language: str, rows: Sequence[Row], resamples: int) -> dict[str, Figure]:
    """Every metric of a task on the rows of one language.

    A name may follow the kind of the task, as in `tagging ner`.

    Raises:
        ConfigError: an empty reference, or tags of another number than the true ones; the row is named.
    """
    for row in rows:
        if not row.truth.strip():
            raise ConfigError(f"{row.place}: the reference in {language!r} is empty")
    predicted, truth = [row.prediction for row in rows], [row.truth for row in rows]
    kind = task.partition(" ")[0]
    if kind == "classification":
        return labels.score_texts(predicted, truth, resamples)
    if kind == "tagging":
        return labels.score_words(*_tags(rows), resamples)
    if kind == "answer":
        return labels.score_answers(predicted, truth, resamples)
    written = languages.target(language)
    return {
        **translation.score(predicted, truth, written, resamples),
        **texts.score(predicted, truth, written, resamples),
    }


def compare(first: Path, second: Path, trials: int) -> Comparison:
    """Tests on each language whether the second file's model is another than the first's.

    Raises:
        ConfigError: as `read`, or the two do not hold the same rows.
    """
    a, b = read(first), read(second)
    if len(a) != len(b):
        raise ConfigError(f"{first} has {len(a)} rows and {second} {len(b)}; a paired test needs the same")
    for number, (one, other) in enumerate(zip(a, b, strict=True), start=1):
        if (one.task, one.language, one.truth) != (other.task, other.language, other.truth):
            raise ConfigError(f"line {number} of {first} and of {second} are different rows")
    groups_a, groups_b = _groups(a), _groups(b)
    found = {
        f"{task} {language}": _difference(task, language, group, groups_b[task, language], trials)
        for (task, language), group in groups_a.items()
    }
    corrected = significance.holm({name: cell.p for name, cell in found.items()})
    cells = {name: Difference(**{**asdict(cell), "p": corrected[name]}) for name, cell in found.items()}
    about = {"first": str(first), "second": str(second), "trials": trials, "correction": "Holm"}
    return Comparison(about, cells)


def _difference(
    task: str, language: str, first: Sequence[Row], second: Sequence[Row], trials: int
) -> Difference:
    kind = task.partition(" ")[0]
    if kind == "answer":
        a, b = (
            np.array([[labels.reciprocal_rank(row.prediction, row.truth), 1.0] for row in side])
            for side in (first, second)
        )
        p = significance.paired(a, b, lambda sums: sums[..., 0] / sums[..., 1], trials)
        return Difference("MRR", 100 * a[:, 0].mean(), 100 * b[:, 0].mean(), p, len(a))
    if kind == "classification":
        a, b = (np.array([[row.prediction == row.truth, 1.0] for row in side]) for side in (first, second))
        p = significance.paired(a, b, lambda sums: sums[..., 0] / sums[..., 1], trials)
        return Difference("accuracy", 100 * a[:, 0].mean(), 100 * b[:, 0].mean(), p, len(a))
    if kind == "tagging":
        a, b = (labels.span_counts(*_tags(side)) for side in (first, second))
        p = significance.paired(a, b, _f1, trials)
        return Difference("span F1", 100 * _f1(a.sum(axis=0)), 100 * _f1(b.sum(axis=0)), p, len(a))
    return _bleu(languages.target(language), first, second, trials)


def _f1(sums: np.ndarray) -> Any:
    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1.0)


def _bleu(language: str, first: Sequence[Row], second: Sequence[Row], trials: int) -> Difference:
    """sacreBLEU's own paired approximate randomisation."""
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    systems: list[tuple[str, Sequence[str]]] = [
        (name, [row.prediction for row in side]) for name, side in (("first", first), ("second", second))
    ]
    metric = BLEU(tokenize=languages.metric_tokenizer(language), references=[[row.truth for row in first]])
    test = PairedTest(systems, {"BLEU": metric}, references=None, test_type="ar", n_samples=trials)
    results: list[Any] = test()[1]["BLEU"]
    one, other = results
    return Difference("BLEU", float(one.score), float(other.score), float(other.p_value), len(first))


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.language), []).append(row)
    return dict(sorted(groups.items()))


def _tags(rows: Sequence[Row]) -> tuple[list[list[str]], list[list[str]]]:
    found = [row.prediction.split() for row in rows], [row.truth.split() for row in rows]
    for row, predicted, truth in zip(rows, *found, strict=True):
        if len(predicted) != len(truth):
            raise ConfigError(f"{row.place} has {len(predicted)} predicted tags and {len(truth)} true ones")
    return found


def show(comparison: Comparison, console: Console) -> None:
    """Prints a row for each language."""
    table = Table(title=f"{comparison.about['first']} and {comparison.about['second']}", title_justify="left")
    for heading in ("language", "metric", "first", "second", "difference", "p (Holm)", "n"):
        table.add_column(heading, justify="left" if heading in {"language", "metric"} else "right")
    for name, cell in comparison.cells.items():
        difference = f"{cell.second - cell.first:+.2f}"
        table.add_row(
            name,
            cell.metric,
            f"{cell.first:.2f}",
            f"{cell.second:.2f}",
            difference,
            f"{cell.p:.4f}",
            f"{cell.n:,}",
        )
    console.print(table)
