"""Judges a model on test sets: reads them whole, lets the model write, scores per language."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlray import languages, storage
from mlray.config import ConfigError, RunConfig, Source
from mlray.corpus import lines, records, sources
from mlray.corpus.fields import Record
from mlray.evaluation import labelling
from mlray.evaluation.labelling import Judge
from mlray.evaluation.predictions import Case, Row, figures, fill_gaps
from mlray.evaluation.report import Report
from mlray.models import backbone, tokenizer
from mlray.models.generation import Continuer, Writer
from mlray.objectives import answers, translation
from mlray.objectives.table import check_family

_VERSIONS = ("torch", "transformers", "sacrebleu", "seqeval", "rouge-score", "nltk")
_SLICE = 512
"""Rows that are predicted between two movements of the bar."""
Rows = dict[str, list[Case]]
"""Language -> rows of the test sets; none where a file has no row that can be scored."""
Checked = tuple[Rows, list[str]]
"""The rows of the test sets, and why some are left out."""
Folders = list[Any]
"""Of the model, its adapter, and the language adapter below; None for one that is not named."""


def evaluate(
    config: RunConfig, checked: Checked | None = None, *, show_progress: bool = True
) -> tuple[Report, list[dict[str, Any]]]:
    """The report on `model.path` over `evaluation.sources`, and a row for each prediction.

    Args:
        config: what is judged, and on what.
        checked: what `check` has found, where it has been called before.
        show_progress: a bar on a terminal.

    Raises:
        ConfigError: no test set, no model, or a row that cannot be scored.
        StorageError: a file cannot be reached.
    """
    if config.model.path is None:
        raise ConfigError(
            "model.path is empty; name the folder of the weights, e.g. checkpoints/step-*/weights"
        )
    if config.adapter.language_path and not config.adapter.path:
        raise ConfigError("adapter.language_path lies below the adapter of a task; name that in adapter.path")
    found_rows, left_out = checked or check(config)
    rows = {name: group for name, group in found_rows.items() if group}
    backbone.quiet()
    begin = time.monotonic()
    report = Report(_about(config, left_out))
    predictions: list[dict[str, Any]] = []
    for name, reason in _without_rows(config, found_rows).items():
        report.empty.setdefault(_kind(config, name), {})[languages.alone(name)] = reason
    with contextlib.ExitStack() as stack:
        places = (config.model.path, config.adapter.path, config.adapter.language_path)
        folders = [
            stack.enter_context(storage.local_copy(uri, config.storage)) if uri else None for uri in places
        ]
        predicted = _PREDICT[config.objective.name](config, folders, rows)
        found_by_group = _watched(predicted, rows, show=show_progress)
        stack.enter_context(contextlib.closing(found_by_group))  # an error takes the bar away
        for (name, group), found in zip(rows.items(), found_by_group, strict=True):
            kind, language = _kind(config, name), languages.alone(name)
            scored = [
                Row(kind, language, prediction, _truth(kind, row), row.place)
                for row, prediction in zip(group, found, strict=True)
            ]
            table = report.cells.setdefault(kind, {})
            table[language] = figures(kind, language, scored, config.evaluation.resamples)
            predictions += [_line(row, case.text) for row, case in zip(scored, group, strict=True)]
    fill_gaps(report)
    report.about["seconds"] = round(time.monotonic() - begin, 1)
    return report, predictions


def _about(config: RunConfig, left_out: list[str]) -> dict[str, Any]:
    return {
        "model": config.model.path,
        "adapter": config.adapter.path,
        "language_adapter": config.adapter.language_path,
        "seed": config.run.seed,
        "evaluation": config.evaluation.model_dump(mode="json"),
        "left_out": left_out,
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def check(config: RunConfig) -> Checked:
    """The rows of the test sets by language, in order, and what is left out, once it is known that they can be scored.

    Raises:
        ConfigError: the objective has no test, a row cannot be scored or has nothing to be scored by, or belongs to no
            task of the run.
        StorageError: a file cannot be reached.
    """
    task = config.objective.name
    if task not in _PREDICT:
        raise ConfigError(f"objective.name={task} has no test; take one of {', '.join(_PREDICT)}")
    check_family(config.objective, config.model)
    groups, left_out = read(config)
    for name, group in groups.items():
        labelling.kind(config, name)
        for case in group:
            if not case.pair:
                raise ConfigError(
                    f"{case.place} has no reference or label; name its column in evaluation.sources[].pair, or "
                    "its file in pair_uri"
                )
    return dict(sorted(groups.items())), left_out


def check_model(config: RunConfig, rows: Rows, tokens: Any, labels: list[str]) -> None:
    """Refuses rows that a model with this tokenizer and these labels cannot be asked.

    Raises:
        ConfigError: it names the file and the row whose labels do not fit, or the language without a token.
    """
    asked = [name for name, group in rows.items() if group]
    if config.objective.name == "translation":
        translation.pairs(tokenizer.encoder(tokens), asked, config.corpus.sequence_length)
    elif labels:
        labelling.Cuts(config, asked, tokens, labels).check({name: rows[name] for name in asked})


def _truth(kind: str, row: Case) -> str:
    """What a prediction is held against: of an answer the number of the right sentence."""
    return str(answers.parse(row.pair, row.row)[0]) if kind.startswith("answer") else row.pair


def _kind(config: RunConfig, name: str) -> str:
    """The task of the rows of a language as a report calls it; of a multi-task run with its name: `tagging ner`."""
    found = labelling.kind(config, name)
    return f"{found} {languages.task(name)}" if languages.task(name) else found


def _line(row: Row, text: str) -> dict[str, Any]:
    truth = "label" if row.task.startswith("classification") else "reference"
    shared = {"task": row.task, "language": row.language, "text": text}
    return {**shared, "prediction": row.prediction, truth: row.truth}


def _translate(config: RunConfig, folders: Folders, rows: Rows) -> Iterator[list[str]]:
    model, adapter, language = folders
    writer = Writer(model, adapter, language, _device())
    directions = translation.directions(list(rows))
    writer.check(directions)  # before any is translated
    for (source, target), group in zip(directions, rows.values(), strict=True):
        for part in _slices(group):
            texts = [row.text for row in part]
            yield writer.translate(texts, source, target, config.evaluation, config.run.seed)


def _continue(config: RunConfig, folders: Folders, rows: Rows) -> Iterator[list[str]]:
    model, adapter, language = folders
    continuer = Continuer(model, adapter, language, _device())
    for group in rows.values():
        for part in _slices(group):
            yield continuer.write([row.text for row in part], config.evaluation, config.run.seed)


def _label(config: RunConfig, folders: Folders, rows: Rows) -> Iterator[list[str]]:
    model, adapter, language = folders
    judge = Judge(config, list(rows), model, adapter, language, _device())
    judge.cuts.check(rows)  # a bad row is told before the model reads any
    for name, group in rows.items():
        for part in _slices(group):
            yield judge.label(part, name)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _slices(group: list[Case]) -> Iterator[list[Case]]:
    for start in range(0, len(group), _SLICE):
        yield group[start : start + _SLICE]


def _watched(parts: Iterator[list[str]], rows: Rows, *, show: bool) -> Generator[list[str], None, None]:
    """The predictions of each language from parts of any length in order, with a bar on a terminal's standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    off = not (show and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=off) as bar:
        work = bar.add_task("", total=sum(map(len, rows.values())))
        for language, group in rows.items():
            bar.update(work, description=language)
            found: list[str] = []
            while len(found) < len(group):
                part = next(parts)
                found += part
                bar.advance(work, len(part))
            yield found


_PREDICT: dict[str, Callable[[RunConfig, Folders, Rows], Iterator[list[str]]]] = {
    "translation": _translate,
    "causal": _continue,
    "tagging": _label,
    "classification": _label,
    "answer": _label,
    "multitask": _label,
}


def read(config: RunConfig) -> Checked:
    """The rows of every test set by language, and what is left out: at most `evaluation.max_bad_rows` bad ones.

    Raises:
        ConfigError: it names the file, the row and the reason; or there are no rows.
    """
    if not config.evaluation.sources:
        raise ConfigError("evaluation.sources is empty; name at least one test set")
    found: Rows = {}
    bad: list[str] = []
    for file in files_of(config.evaluation.sources, config):
        if not file.language_column:
            found.setdefault(file.fallback, [])
        try:
            _take(file, config, found, bad)
        except lines.BrokenChunk as error:
            raise ConfigError(f"{file.uri}: {error}") from error
    if not any(found.values()):
        raise ConfigError("evaluation.sources holds no row; name a test set with some")
    return found, bad


def _take(file: sources.SourceFile, config: RunConfig, found: Rows, bad: list[str]) -> None:
    """Adds the rows of a file."""
    for row, record in rows_of(file, config):
        if not record.reason:
            case = Case(record.text, record.pair, file.uri, row, record.key)
            found.setdefault(record.language, []).append(case)
            continue
        bad.append(f"{file.uri}: row {row} cannot be scored: {record.reason}")
        if len(bad) > config.evaluation.max_bad_rows:
            raise ConfigError(f"{bad[-1]} (evaluation.max_bad_rows={config.evaluation.max_bad_rows})")


def files_of(wanted: tuple[Source, ...], config: RunConfig) -> list[sources.SourceFile]:
    """The files of sources; what `datasets` loads lies beside the run, as that of the training.

    Raises:
        ConfigError: a source cannot be loaded or mapped.
        StorageError: a source is empty or cannot be listed.
    """
    place = storage.join(storage.absolute(config.run.storage_uri), config.run.name, "imported")
    return sources.list_files(sources.import_datasets(wanted, place, config.storage), config.storage)


def rows_of(file: sources.SourceFile, config: RunConfig) -> Iterator[tuple[int, Record]]:
    """The records of a file, good and bad, each with its row in the whole file.

    Raises:
        BrokenChunk: the rest of the file is damaged.
        StorageError: it cannot be reached.
    """
    first = 0
    for chunk in records.chunks(file, max(file.size, 1), config.storage):
        for batch in records.read(chunk, config.corpus.max_chars, config.storage):
            yield from ((first + record.row, record) for record in batch)
        first += chunk.stop if file.format == "parquet" else 0


def _without_rows(config: RunConfig, rows: Rows) -> dict[str, str]:
    """Why a language of the corpus, or of a test set, has no figure."""
    reason = "no test rows: corpus.languages names it, and evaluation.sources holds no row in it"
    named = {language: reason for language in sorted(config.corpus.languages) if language not in rows}
    barren = [name for name, group in rows.items() if not group]
    return {**named, **dict.fromkeys(barren, "no test rows: its files hold none that can be scored")}
