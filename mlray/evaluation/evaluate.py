"""Judges a model on test sets: reads them whole, lets the model write, scores per language."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.corpus import lines, records, sources
from mlray.corpus.records import Record
from mlray.evaluation import labels, translation
from mlray.evaluation.labelling import Judge
from mlray.evaluation.report import Figure, Report
from mlray.models.generation import Writer

_VERSIONS = ("torch", "transformers", "sacrebleu", "scikit-learn", "seqeval")
Rows = dict[str, list[Record]]
"""Language -> rows of the test sets."""
Cells = dict[str, dict[str, Figure]]
"""Language -> metric -> figure."""


def evaluate(config: RunConfig) -> tuple[Report, list[dict[str, Any]]]:
    """The report on `model.path` over `evaluation.sources`, and a row for each prediction.

    Raises:
        ConfigError: no test set, no model, or a row that cannot be scored.
        StorageError: a file cannot be reached.
    """
    if config.model.path is None:
        raise ConfigError(
            "model.path is empty; name the folder of the weights, e.g. checkpoints/step-*/weights"
        )
    if config.objective.name not in _TASKS:
        raise ConfigError(
            f"objective.name={config.objective.name} has no test; take one of {', '.join(_TASKS)}"
        )
    rows = read(config)
    begin = time.monotonic()
    report = Report(
        {
            "model": config.model.path,
            "evaluation": config.evaluation.model_dump(mode="json"),
            "versions": {
                name: metadata.version(name)
                for name in ("torch", "transformers", "sacrebleu", "scikit-learn", "seqeval")
            },
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        }
    )
    predictions: list[dict[str, Any]] = []
    judge = _TASKS[config.objective.name]
    with storage.local_copy(config.model.path, config.storage) as folder:
        report.cells[config.objective.name] = judge(config, folder, rows, predictions)
    report.about["seconds"] = round(time.monotonic() - begin, 1)
    return report, predictions


def _translate(config: RunConfig, folder: Path, rows: Rows, predictions: list[dict[str, Any]]) -> Cells:
    writer = Writer(folder)
    cells: Cells = {}
    for direction, group in sorted(rows.items()):
        source, _, target = direction.partition("-")
        written = writer.translate([row.text for row in group], source, target, config.evaluation)
        references = [row.pair for row in group]
        cells[direction] = translation.score(written, references, target, config.evaluation.resamples)
        predictions += _lines(direction, group, written)
    return cells


def _label_words(config: RunConfig, folder: Path, rows: Rows, predictions: list[dict[str, Any]]) -> Cells:
    judge = Judge(config, folder)
    cells: Cells = {}
    for language, group in sorted(rows.items()):
        found = judge.label(group)
        truth = [row.pair.split(" ") for row in group]
        cells[language] = labels.score_words(found, truth, config.evaluation.resamples)
        predictions += _lines(language, group, [" ".join(tags) for tags in found])
    return cells


def _label_texts(config: RunConfig, folder: Path, rows: Rows, predictions: list[dict[str, Any]]) -> Cells:
    judge = Judge(config, folder)
    cells: Cells = {}
    for language, group in sorted(rows.items()):
        found = [one for (one,) in judge.label(group)]
        truth = [row.pair for row in group]
        cells[language] = labels.score_texts(found, truth, config.evaluation.resamples)
        predictions += _lines(language, group, found)
    return cells


def _lines(language: str, group: list[Record], predictions: list[str]) -> list[dict[str, Any]]:
    return [
        {"language": language, "text": row.text, "prediction": prediction, "reference": row.pair}
        for row, prediction in zip(group, predictions, strict=True)
    ]


_TASKS: dict[str, Callable[[RunConfig, Path, Rows, list[dict[str, Any]]], Cells]] = {
    "translation": _translate,
    "tagging": _label_words,
    "classification": _label_texts,
}


def read(config: RunConfig) -> dict[str, list[Record]]:
    """The rows of every test set by language; one that is bad is an error, since a score must not depend on it.

    Raises:
        ConfigError: it names the file, the row and the reason.
    """
    if not config.evaluation.sources:
        raise ConfigError("evaluation.sources is empty; name at least one test set")
    found: dict[str, list[Record]] = {}
    for file in sources.list_files(config.evaluation.sources, config.storage):
        try:
            for chunk in records.chunks(file, max(file.size, 1), config.storage):
                for batch in records.read(chunk, config.corpus.max_chars, config.storage):
                    for record in batch:
                        if record.reason:
                            raise ConfigError(
                                f"{file.uri}: row {record.row} cannot be scored: {record.reason}"
                            )
                        found.setdefault(record.language, []).append(record)
        except lines.BrokenChunk as error:
            raise ConfigError(f"{file.uri}: {error}") from error
    return found
