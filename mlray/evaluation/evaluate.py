"""Judges a model on test sets: reads them whole, lets the model write, scores per language."""

from __future__ import annotations

import platform
import time
from importlib import metadata

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.corpus import lines, records, sources
from mlray.corpus.records import Record
from mlray.evaluation import translation
from mlray.evaluation.report import Report
from mlray.models.generation import Writer


def evaluate(config: RunConfig) -> tuple[Report, list[dict[str, str]]]:
    """The report on `model.path` over `evaluation.sources`, and a row for each prediction.

    Raises:
        ConfigError: no test set, no model, or a row that cannot be scored.
        StorageError: a file cannot be reached.
    """
    if config.model.path is None:
        raise ConfigError(
            "model.path is empty; name the folder of the weights, e.g. checkpoints/step-*/weights"
        )
    rows = read(config)
    begin = time.monotonic()
    report = Report(
        {
            "model": config.model.path,
            "evaluation": config.evaluation.model_dump(mode="json"),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "sacrebleu")},
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        }
    )
    predictions: list[dict[str, str]] = []
    with storage.local_copy(config.model.path, config.storage) as folder:
        writer = Writer(folder)
        for direction, group in sorted(rows.items()):
            source, _, target = direction.partition("-")
            written = writer.translate([row.text for row in group], source, target, config.evaluation)
            references = [row.pair for row in group]
            figures = translation.score(written, references, target, config.evaluation.resamples)
            report.cells.setdefault("translation", {})[direction] = figures
            predictions += [
                {"language": direction, "text": row.text, "prediction": text, "reference": row.pair}
                for row, text in zip(group, written, strict=True)
            ]
    report.about["seconds"] = round(time.monotonic() - begin, 1)
    return report, predictions


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
