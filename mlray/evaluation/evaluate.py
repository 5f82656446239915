"""Judges a model on test sets: reads them whole, lets the model write, scores per language."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.corpus import lines, records, sources
from mlray.corpus.records import Record
from mlray.evaluation.labelling import Judge
from mlray.evaluation.predictions import Row, figures
from mlray.evaluation.report import Report
from mlray.models import backbone
from mlray.models.generation import Writer

_VERSIONS = ("torch", "transformers", "sacrebleu", "scikit-learn", "seqeval", "rouge-score", "nltk")
Rows = dict[str, list[Record]]
"""Language -> rows of the test sets."""
Folders = list[Any]
"""Of the model, its adapter, and the language adapter below; None for one that is not named."""


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
    task = config.objective.name
    if task not in _PREDICT:
        raise ConfigError(f"objective.name={task} has no test; take one of {', '.join(_PREDICT)}")
    truth = "label" if task == "classification" else "reference"
    rows = dict(sorted(read(config).items()))
    backbone.quiet()
    begin = time.monotonic()
    report = Report(
        {
            "model": config.model.path,
            "adapter": config.adapter.path,
            "evaluation": config.evaluation.model_dump(mode="json"),
            "versions": {name: metadata.version(name) for name in _VERSIONS},
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        }
    )
    predictions: list[dict[str, Any]] = []
    table = report.cells.setdefault(task, {})
    with contextlib.ExitStack() as stack:
        places = (config.model.path, config.adapter.path, config.adapter.language_path)
        folders = [
            stack.enter_context(storage.local_copy(uri, config.storage)) if uri else None for uri in places
        ]
        found_by_group = _PREDICT[task](config, folders, rows)
        for (language, group), found in zip(rows.items(), found_by_group, strict=True):
            both = list(zip(group, found, strict=True))
            scored = [Row(task, language, prediction, row.pair) for row, prediction in both]
            table[language] = figures(task, language, scored, config.evaluation.resamples)
            shared = {"task": task, "language": language}
            predictions += [
                {**shared, "text": row.text, "prediction": prediction, truth: row.pair}
                for row, prediction in both
            ]
    report.about["seconds"] = round(time.monotonic() - begin, 1)
    return report, predictions


def _translate(config: RunConfig, folders: Folders, rows: Rows) -> Iterator[list[str]]:
    writer = Writer(*folders)
    for direction, group in rows.items():
        source, _, target = direction.partition("-")
        yield writer.translate([row.text for row in group], source, target, config.evaluation)


def _label(config: RunConfig, folders: Folders, rows: Rows) -> Iterator[list[str]]:
    judge = Judge(config, list(rows), *folders)
    for name, group in rows.items():
        yield judge.label(group, name)


_PREDICT: dict[str, Callable[[RunConfig, Folders, Rows], Iterator[list[str]]]] = {
    "translation": _translate,
    "tagging": _label,
    "classification": _label,
    "answer": _label,
    "multitask": _label,
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
