"""What a bundle is judged by, as two files that belong together: a report, and the rows behind it for paired tests."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from mlray import languages, seal, storage
from mlray.config import ConfigError, Storage
from mlray.evaluation.report import Report

REPORT, ROWS = FILES = ("report.json", "predictions.jsonl")


def read(uri: str, settings: Storage, missing: str) -> Report:
    """The report of an evaluation that is whole.

    Raises:
        ConfigError: a file is not there; it is named, and `missing` says what to do.
    """
    for name in FILES:
        if not storage.exists(place := storage.join(uri, name), settings):
            raise ConfigError(f"{place} is not there; {missing}")
    return Report.from_json(storage.read_bytes(storage.join(uri, REPORT), settings).decode())


def copy(uri: str, target: Path, settings: Storage) -> None:
    """Copies an evaluation into a local folder."""
    for name in FILES:
        (target / name).write_bytes(storage.read_bytes(storage.join(uri, name), settings))


def is_of(report: Report, weights: Path) -> bool:
    """Whether the weights in a folder are those that were judged."""
    return report.about.get("sha256") == seal.digest(weights)


def add(stage: Path, judged: Path) -> None:
    """Puts the evaluation of other tasks beside that in `stage`."""
    ours, theirs = Report.read(stage), Report.read(judged)
    ours.cells.update(theirs.cells)
    (stage / REPORT).write_text(ours.to_json(), encoding="utf-8")
    with (stage / ROWS).open("a", encoding="utf-8") as rows:
        rows.write((judged / ROWS).read_text(encoding="utf-8"))


def take_over(stage: Path, tag: str, judged: Path, known: Collection[str] = ()) -> None:
    """Puts the evaluation of a market's adapter into that of the bundle, wherever it is this one that reads.

    Args:
        stage: the bundle that is being made; its evaluation is rewritten.
        tag: of the market.
        judged: folder with the adapter's own.
        known: the markets that have an adapter, if one without is read by that of a related one.

    Raises:
        ConfigError: the adapter was not judged wherever it reads and the bundle was judged.
    """
    ours, theirs = Report.read(stage), Report.read(judged)
    taken = [
        (task, name)
        for task, table in ours.cells.items()
        for name in table
        if task in theirs.cells
        and tag in {market := languages.target(name), languages.nearest(market, known)}
    ]
    left = [f"{task}, {name}" for task, name in taken if name not in theirs.cells[task]]
    if left or not taken:
        where = f" ({left[0]})" if left else ""
        raise ConfigError(
            f"the adapter for {tag} was not judged where the bundle was{where}; evaluate it on the same rows"
        )
    replace(stage, judged, taken)


def replace(stage: Path, judged: Path, taken: Sequence[tuple[str, str]]) -> None:
    """Puts figures of one evaluation, and the rows behind them, into another.

    Args:
        stage: folder whose evaluation is rewritten.
        judged: folder with those of the other.
        taken: task and language of each cell that the other one gives.
    """
    ours, theirs = Report.read(stage), Report.read(judged)
    for task, name in taken:
        ours.cells.setdefault(task, {})[name] = theirs.cells[task][name]
    (stage / REPORT).write_text(ours.to_json(), encoding="utf-8")
    rows = [
        *(row for row in _rows_in(stage) if (row["task"], row["language"]) not in taken),
        *(row for row in _rows_in(judged) if (row["task"], row["language"]) in taken),
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (stage / ROWS).write_text(text, encoding="utf-8")


def _rows_in(folder: Path) -> list[dict[str, str]]:
    text = (folder / ROWS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]
