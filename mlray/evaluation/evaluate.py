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

from mlray import languages, seal, storage
from mlray.config import Adapter, ConfigError, RunConfig
from mlray.corpus import testsets
from mlray.corpus.testsets import Case, Checked, Rows
from mlray.evaluation import labelling, recommendation, retrieval
from mlray.evaluation.labelling import Judge
from mlray.evaluation.predictions import Row, figures, fill_gaps, kind_of
from mlray.evaluation.report import Report
from mlray.evaluation.retrieval import Finder
from mlray.models import backbone, tokenizer
from mlray.models.generation import Continuer, Writer
from mlray.objectives import answers, translation
from mlray.objectives.checks import check_family, check_places
from mlray.objectives.embedding import TextEmbedder
from mlray.objectives.recommending import NextItem
from mlray.objectives.table import OBJECTIVES

_VERSIONS = ("torch", "transformers", "sacrebleu", "seqeval", "rouge-score", "nltk")
_SLICE = 512
"""Rows that are predicted between two movements of the bar."""
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
    _check_adapter(config.adapter)
    found_rows, left_out = checked or check(config)
    rows = {name: group for name, group in found_rows.items() if group}
    spans = labelling.mark_spans(config, rows)
    backbone.quiet()
    begin = time.monotonic()
    report = Report(_about(config, left_out))
    predictions: list[dict[str, Any]] = []
    for name, reason in testsets.without_rows(config, found_rows).items():
        report.empty.setdefault(_kind(config, name), {})[languages.alone(name)] = reason
    with contextlib.ExitStack() as stack:
        places = (config.model.path, config.adapter.path, config.adapter.language_path)
        folders = [
            stack.enter_context(storage.local_copy(uri, config.storage)) if uri else None for uri in places
        ]
        if (judged := folders[1] or folders[0]) and judged.is_dir():  # else the name of a model on a hub
            report.about["sha256"] = seal.digest(judged)
        predicted = _PREDICT[config.objective.name](config, folders, rows, report)
        found_by_group = _watched(predicted, rows, show=show_progress)
        stack.enter_context(contextlib.closing(found_by_group))  # an error takes the bar away
        for (name, group), found in zip(rows.items(), found_by_group, strict=True):
            kind, language = _kind(config, name), languages.alone(name)
            scored = [
                Row(kind, language, prediction, truth, row.place)
                for row, prediction, truth in zip(group, found, _truths(kind, group), strict=True)
            ]
            table = report.cells.setdefault(kind, {})
            table[language] = figures(kind, language, scored, config.evaluation.resamples, spans=spans[name])
            predictions += [_line(row, case.text) for row, case in zip(scored, group, strict=True)]
    fill_gaps(report)
    report.about["seconds"] = round(time.monotonic() - begin, 1)
    return report, predictions


def _check_adapter(adapter: Adapter) -> None:
    """Refuses what would not be judged.

    Raises:
        ConfigError: an adapter, or what lies below it, without its weights.
    """
    if adapter.kind != "none" and not adapter.path:
        raise ConfigError(
            f"adapter.kind={adapter.kind} but adapter.path is empty; name the trained adapter, or judge the "
            "backbone alone with adapter.kind=none"
        )
    if adapter.language_path and not adapter.path:
        raise ConfigError("adapter.language_path lies below the adapter of a task; name that in adapter.path")


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
    check_places(config)
    groups, left_out = testsets.read(config, distinct=OBJECTIVES[task].distinct)
    for name, group in groups.items():
        labelling.kind(config, name)
        for case in group:
            if not case.pair:
                raise ConfigError(
                    f"{case.place} has no reference or label; name its column in evaluation.sources[].pair, or "
                    "its file in pair_uri"
                )
    if _PREDICT[task] is _find:
        groups = retrieval.both_ways(groups)
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
        told = {name: rows[name] for name in asked}
        labelling.mark_spans(config, told)
        labelling.Cuts(config, asked, tokens, labels).check(told)


def _truths(kind: str, group: list[Case]) -> list[str]:
    """What predictions are held against: of an answer the number of the right sentence, of a text that of its pair."""
    if kind == "retrieval":
        return retrieval.truths(group)
    answer = kind_of(kind) == "answer"
    return [str(answers.parse(row.pair, row.row)[0]) if answer else row.pair for row in group]


def _kind(config: RunConfig, name: str) -> str:
    """The task of the rows of a language as a report calls it; of a multi-task run with its name: `tagging ner`."""
    found = labelling.kind(config, name)
    if _PREDICT[found] is _find:
        return "retrieval"
    if found == "next_item":
        # Among other candidates it is another task: figures of the two are not compared.
        number = config.evaluation.negatives
        return f"recommendation {number}" if number else "recommendation"
    return f"{found} {languages.task(name)}" if languages.task(name) else found


def _line(row: Row, text: str) -> dict[str, Any]:
    truth = "label" if kind_of(row.task) == "classification" else "reference"
    shared = {"task": row.task, "language": row.language, "place": row.place, "text": text}
    return {**shared, "prediction": row.prediction, truth: row.truth}


def _translate(config: RunConfig, folders: Folders, rows: Rows, report: Report) -> Iterator[list[str]]:
    model, adapter, language = folders
    writer = Writer(model, adapter, language, _device())
    directions = translation.directions(list(rows))
    writer.check(directions)  # before any is translated
    _tell_cuts(report, rows, writer.encoder, writer.room)
    for (source, target), (name, group) in zip(directions, rows.items(), strict=True):
        for part in _slices(group):
            texts = [row.text for row in part]
            written = writer.translate(texts, source, target, config.evaluation, config.run.seed)
            report.count("unfinished", name, writer.unfinished)
            yield written


def _continue(config: RunConfig, folders: Folders, rows: Rows, report: Report) -> Iterator[list[str]]:
    model, adapter, language = folders
    continuer = Continuer(model, adapter, language, _device())
    _tell_cuts(report, rows, continuer.encoder, continuer.room(config.evaluation))
    for name, group in rows.items():
        for part in _slices(group):
            written = continuer.write([row.text for row in part], config.evaluation, config.run.seed)
            report.count("unfinished", name, continuer.unfinished)
            yield written


def _label(config: RunConfig, folders: Folders, rows: Rows, report: Report) -> Iterator[list[str]]:
    model, adapter, language = folders
    judge = Judge(config, list(rows), model, adapter, language, _device())
    judge.cuts.check(rows)  # a bad row is told before the model reads any
    for name, group in rows.items():
        report.count("cut_off", name, judge.cuts.cut_off(group, name))
        if unknown := judge.cuts.unknown(group, name):
            report.about.setdefault("unknown_labels", {})[name] = unknown
    for name, group in rows.items():
        for part in _slices(group):
            yield judge.label(part, name)


def _find(config: RunConfig, folders: Folders, rows: Rows, report: Report) -> Iterator[list[str]]:
    model, adapter, language = folders
    embedder = TextEmbedder(config, model, adapter, language, _device())
    _tell_cuts(report, rows, embedder.encoder, embedder.room)
    finder = Finder(embedder, rows)
    if mixed := finder.mixed(config.evaluation.resamples):
        report.cells["mixed pool"] = mixed
    for name in rows:
        yield from finder.find(name)


def _recommend(config: RunConfig, folders: Folders, rows: Rows, report: Report) -> Iterator[list[str]]:
    model, adapter, language = folders
    shelf = NextItem(config, model, adapter, language, _device())
    shelf.check(list(rows))
    asked = config.evaluation
    for name, group in rows.items():
        market = recommendation.Market.of(group)
        found = list(recommendation.rank(shelf, group, market, name, asked.negatives))
        report.cells.setdefault(recommendation.CATALOGUE, {})[name] = market.figures(asked.resamples)
        yield from found


def _tell_cuts(report: Report, rows: Rows, encoder: tokenizer.Encoder, room: int) -> None:
    """Counts the texts that the model does not see whole."""
    for name, group in rows.items():
        encoded = encoder.encode([case.text for case in group])
        report.count("cut_off", name, sum(len(ids) > room for ids in encoded))


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


_PREDICT: dict[str, Callable[[RunConfig, Folders, Rows, Report], Iterator[list[str]]]] = {
    "translation": _translate,
    "causal": _continue,
    "tagging": _label,
    "classification": _label,
    "answer": _label,
    "multitask": _label,
    "contrastive": _find,
    "distillation": _find,
    "next_item": _recommend,
}
