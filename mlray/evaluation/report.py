"""What an evaluation says: a figure for every task, language and metric, with its size and interval."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlray.config import ConfigError
from mlray.console import left_out

LOWER_IS_BETTER = {"TER", "own above", "others above", "language bias"}
_NOTES = {
    "cut_off": "texts longer than a row, judged without their end",
    "unfinished": "texts that the model wrote without an end within evaluation.max_new_tokens",
}


@dataclass(frozen=True)
class Figure:
    """A value, its 95 % interval, the number of rows behind it, and how it was computed."""

    value: float
    low: float
    high: float
    n: int
    signature: str


@dataclass(frozen=True)
class Report:
    """Task -> language -> metric -> figure, and what was judged."""

    about: dict[str, Any]
    cells: dict[str, dict[str, dict[str, Figure]]] = field(default_factory=dict)
    empty: dict[str, dict[str, str]] = field(default_factory=dict)
    """Task -> language without figures -> why it has none."""

    def count(self, what: str, language: str, number: int) -> None:
        """Adds to a number of texts that `about` tells of a language, such as those that were cut off."""
        if number:
            counts = self.about.setdefault(what, {})
            counts[language] = counts.get(language, 0) + number

    def notes(self) -> list[str]:
        """A line each on what a figure does not show: texts cut, outputs without an end, labels and rows left out."""
        result = [
            f"{language}: {what}: {number:,}"
            for key, what in _NOTES.items()
            for language, number in self.about.get(key, {}).items()
        ]
        for language, counts in self.about.get("unknown_labels", {}).items():
            told = ", ".join(f"{label} ({number:,})" for label, number in counts.items())
            result.append(f"{language}: labels that the training did not know count as wrong: {told}")
        if bad := self.about.get("left_out"):
            result.append(left_out(bad))
        return result

    def summary(self, task: str) -> dict[str, dict[str, Any]]:
        """Of each metric of a task: mean over the languages, the worst language, and how far it is behind the mean."""
        table = self.cells[task]
        result: dict[str, dict[str, Any]] = {}
        for metric in next(iter(table.values())):
            values = {language: figures[metric].value for language, figures in table.items()}
            macro = sum(values.values()) / len(values)
            if metric in LOWER_IS_BETTER:
                worst = max(values, key=lambda language: abs(values[language]))  # a bias may go either way
            else:
                worst = min(values, key=lambda language: values[language])
            result[metric] = {"macro": macro, "worst": worst, "gap": abs(macro - values[worst])}
        return result

    def to_json(self) -> str:
        """The whole report."""
        body = {
            "about": self.about,
            "cells": {
                task: {
                    language: {name: asdict(figure) for name, figure in row.items()}
                    for language, row in table.items()
                }
                for task, table in self.cells.items()
            },
            "empty": {task: reasons for task, reasons in self.empty.items() if reasons},
            "summary": {task: self.summary(task) for task in self.cells},
        }
        return json.dumps(body, ensure_ascii=False, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Report:
        """That of a folder, `report.json`.

        Raises:
            ConfigError: it is none.
        """
        return cls.from_json((folder / "report.json").read_text(encoding="utf-8"))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads `to_json` back.

        Raises:
            ConfigError: it is none.
        """
        try:
            body = json.loads(text)
            cells = {
                task: {
                    language: {name: Figure(**figure) for name, figure in row.items()}
                    for language, row in table.items()
                }
                for task, table in body["cells"].items()
            }
            return cls(dict(body["about"]), cells, dict(body["empty"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"it is no report of an evaluation: {error!r}") from None


def show(report: Report, console: Console) -> None:
    """Prints a table for each task: value +- half the interval, then the mean, the worst language, and the gap."""
    for task, table in report.cells.items():
        console.print(_table(report, task, table))
    for task, reasons in report.empty.items():
        for reason in dict.fromkeys(reasons.values()):
            names = [language for language, own in reasons.items() if own == reason]
            console.print(f"{task}, {', '.join(names)}: {reason}", markup=False)
    for note in report.notes():
        console.print(note, markup=False)


def _shown(figure: Figure) -> str:
    """One row has no spread, and so no interval."""
    half = f" ± {(figure.high - figure.low) / 2:.1f}" if figure.n > 1 else ""
    return f"{figure.value:.1f}{half}"


def _table(report: Report, task: str, table: dict[str, dict[str, Figure]]) -> Table:
    metrics = list(next(iter(table.values())))
    shown = Table(title=escape(task), title_justify="left")
    shown.add_column("language")
    for metric in metrics:
        shown.add_column(metric, justify="right")
    shown.add_column("n", justify="right")
    for language, figures in sorted(table.items()):
        cells = [_shown(figures[name]) for name in metrics]
        shown.add_row(escape(language), *cells, f"{figures[metrics[0]].n:,}")
    empty = report.empty.get(task, {})
    # A corpus of pairs has many; they are told below.
    for language in empty if len(empty) <= len(table) else ():
        shown.add_row(escape(language), *("-" for _ in metrics), "0")
    summary = report.summary(task)
    shown.add_section()
    shown.add_row("mean", *(f"{summary[name]['macro']:.1f}" for name in metrics), "")
    shown.add_row("worst", *(escape(summary[name]["worst"]) for name in metrics), "")
    shown.add_row("gap", *(f"{summary[name]['gap']:.1f}" for name in metrics), "")
    return shown
