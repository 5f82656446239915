"""Scores of ready predictions.

A file holds a JSON object a line: `prediction`, `language`, and `reference` (a text) or `label` (of a text); with
`"task": "tagging"` both are tags with a space between (or a list), with `"task": "answer"` the numbers of sentences,
with `"task": "retrieval"` those of candidates, the nearest first, and of all that are right, and with `"task":
"recommendation"` items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlray import access, languages, storage
from mlray.config import ConfigError, Evaluation, Storage
from mlray.corpus.cleaning import SURROGATE, is_unseen
from mlray.evaluation import labels, ranking, texts, translation
from mlray.evaluation.report import Figure, Report
from mlray.objectives import labels as tagged
from mlray.objectives.table import HEADS

DEFAULT = Storage()
_KINDS = {*HEADS, "translation", "causal", "text", "retrieval", "recommendation"}


@dataclass(frozen=True)
class Row:
    """A prediction and what it should have been."""

    task: str
    language: str
    prediction: str
    truth: str
    place: str = ""
    """File and line or row, for an error's beginning."""
    text: str = ""
    """What was asked, where that is known."""


def kind_of(task: str) -> str:
    """The kind of a task, which its own name may follow, as in `tagging ner`."""
    return task.partition(" ")[0]


def read(uri: str | Path, settings: Storage = DEFAULT) -> list[Row]:
    """The rows of a file, also an `s3://` one.

    Raises:
        ConfigError: it is no UTF-8, or a line is no row; file and line are named.
        StorageError: it cannot be reached.
    """
    try:
        content = storage.read_bytes(storage.absolute(str(uri)), settings).decode("utf-8-sig")
    except access.StorageError as error:
        raise access.StorageError(f"cannot read the predictions: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the predictions {uri}: {error}") from None
    if not content.strip():
        raise ConfigError(f"{uri} is empty")
    lines = content.rstrip().split("\n")  # texts may hold U+2028
    rows = []
    for number, line in enumerate(lines, start=1):
        place = f"{uri}: line {number}"
        try:
            rows.append(_row(json.loads(line), place))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{place} is not JSON: {error}") from None
        except RecursionError:
            raise ConfigError(f"{place} is JSON that is nested too deeply") from None
        except ValueError as error:
            raise ConfigError(f"{place} {error}") from None
    return rows


def _row(entry: object, place: str) -> Row:
    if not isinstance(entry, dict) or not ("label" in entry or "reference" in entry):
        raise ValueError("is no object with prediction, language, and reference or label")
    if SURROGATE.search(json.dumps(entry, ensure_ascii=False)):
        raise ValueError("holds half of a surrogate pair, which is no text")
    name = "label" if "label" in entry else "reference"
    task = str(entry.get("task") or ("classification" if name == "label" else "text"))
    if kind_of(task) not in _KINDS:
        if name == "reference":
            raise ValueError(f"is of the task {task!r}; take one of {', '.join(sorted(_KINDS))}")
        task = f"classification {task}"
    language = languages.normalize(str(entry.get("language")))
    if entry.get("language") is None or language is None:
        raise ValueError(f"has the language {entry.get('language')!r}, which is no tag")
    text = entry.get("text")
    said, truth = (_told(entry.get(key), key, task) for key in ("prediction", name))
    if is_unseen(truth):
        raise ValueError(f"has an empty {name}")
    if kind_of(task) in _RANKED and len(set(said.split())) < len(said.split()):
        raise ValueError("names a candidate twice in its prediction")
    return Row(task, language, said, truth, place, text if isinstance(text, str) else "")


def _told(value: object, key: str, task: str) -> str:
    """A text, a label (which may be a number, true or false), or tags (which may be a list)."""
    kind = kind_of(task)
    if isinstance(value, str):
        return value
    if kind == "classification" and isinstance(value, int):
        return str(value).lower()
    if (
        kind in {"tagging", "answer", "retrieval", "recommendation"}
        and isinstance(value, list)
        and all(isinstance(v, str | int) for v in value)
    ):
        return " ".join(map(str, value))
    raise ValueError(f"has a {key} that is no text but {type(value).__name__}")


def score(uri: str | Path, config: Evaluation, settings: Storage = DEFAULT) -> Report:
    """The report on ready predictions.

    Raises:
        ConfigError: as `read`, and for a row that cannot be scored.
        StorageError: as `read`.
    """
    return report_of(read(uri, settings), {"predictions": str(uri)}, config)


def report_of(rows: Sequence[Row], about: dict[str, Any], config: Evaluation) -> Report:
    """The report on rows.

    Raises:
        ConfigError: one cannot be scored.
    """
    report = Report({**about, "resamples": config.resamples})
    spans = mark_spans(rows)
    for (task, language), group in by_language(rows).items():
        table = report.cells.setdefault(task, {})
        table[language] = figures(task, language, group, config.resamples, spans=spans.get(task, True))
    fill_gaps(report)
    return report


def fill_gaps(report: Report) -> None:
    """Gives every cell of task and language without a figure its reason, where other tasks have that language."""
    for task, table in report.cells.items():
        own = {_is_direction(task, language) for language in table}
        others = {
            language
            for other, cells in report.cells.items()
            for language in cells
            if _is_direction(other, language) in own
        }
        reasons = report.empty.setdefault(task, {})
        for language in sorted(others - table.keys()):
            reasons.setdefault(language, "no test rows: only other tasks have some in this language")


def _is_direction(task: str, language: str) -> bool:
    """Whether a language of a task is a direction of translation; labels have none, and `de-ba` is a dialect there."""
    return languages.is_direction(language) and kind_of(task) not in HEADS


def mark_spans(rows: Sequence[Row]) -> dict[str, bool]:
    """Task of tags -> whether they mark spans, in all its languages alike.

    Raises:
        ConfigError: as `objectives.labels.mark_spans`.
    """
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if kind_of(row.task) == "tagging":
            places = found.setdefault(row.task, {})
            for tag in f"{row.truth} {row.prediction}".split():
                places.setdefault(tag, row.place)
    return {task: tagged.mark_spans(places) for task, places in found.items()}


_RANKED = {
    "answer": ranking.OF_ANSWERS,
    "retrieval": ranking.METRICS,
    "recommendation": ranking.OF_ONE,
}
"""Kind of task whose predictions are ranked lists -> their measures."""


def figures(
    task: str, language: str, rows: Sequence[Row], resamples: int, *, spans: bool = True
) -> dict[str, Figure]:
    """Every metric of a task on the rows of one language; of tags those of spans, or of words.

    Raises:
        ConfigError: tags of another number than the true ones; the row is named.
    """
    predicted, truth = [row.prediction for row in rows], [row.truth for row in rows]
    kind = kind_of(task)
    if kind == "classification":
        return labels.score_texts(predicted, truth, resamples)
    if kind == "tagging":
        return labels.score_words(*tags(rows), resamples, spans=spans)
    if kind in _RANKED:
        return ranking.score(predicted, truth, resamples, _RANKED[kind])
    written = languages.target(language)
    return {
        **translation.score(predicted, truth, written, resamples),
        **texts.score(predicted, truth, written, resamples),
    }


def by_language(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Task and language -> its rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.language), []).append(row)
    return dict(sorted(groups.items()))


def tags(rows: Sequence[Row]) -> tuple[list[list[str]], list[list[str]]]:
    """Predicted and true tags of the words of each row.

    Raises:
        ConfigError: they are of different number; the row is named.
    """
    found = [row.prediction.split() for row in rows], [row.truth.split() for row in rows]
    for row, predicted, truth in zip(rows, *found, strict=True):
        if len(predicted) != len(truth):
            raise ConfigError(f"{row.place} has {len(predicted)} predicted tags and {len(truth)} true ones")
    return found
