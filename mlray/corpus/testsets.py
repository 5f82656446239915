"""Test sets, mapped as the corpus is: their rows by language, and which of them count."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from mlray import access, configuration, languages, storage
from mlray.config import ConfigError, RunConfig, Source
from mlray.corpus import lines, records, sources
from mlray.corpus.cleaning import is_unseen
from mlray.corpus.fields import Record, share_of
from mlray.schema import SEPARATOR


class Case(NamedTuple):
    """A row of a test set."""

    text: str
    pair: str
    """The reference, the label, or the tags."""
    file: str
    row: int
    """In the file, from 0."""
    key: str = ""
    """The cell of `part_by`: rows of several sets that share it are one row, such as a text and its translation."""
    item: int = 0
    """Number of what a pair is about; 0 if that is not known."""

    @property
    def place(self) -> str:
        """File and row, for an error's beginning."""
        return f"{self.file}: row {self.row}"


Rows = dict[str, list[Case]]
"""Language -> rows of the test sets; none where a file has no row that can be scored."""
Checked = tuple[Rows, list[str]]
"""The rows of the test sets, and why some are left out."""


def read(config: RunConfig, *, distinct: bool = False) -> Checked:
    """The rows of every test set by language, and what is left out: at most `evaluation.max_bad_rows` bad ones.

    Args:
        config: its `evaluation` names the sets.
        distinct: a row with the same text on both sides is a bad one.

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
            _take(replace(file, distinct=distinct), config, found, bad)
        except lines.BrokenChunk as error:
            raise ConfigError(f"{file.uri}: {error}") from error
    if not any(found.values()):
        raise ConfigError("evaluation.sources holds no row; name a test set with some")
    if most := config.evaluation.max_rows:
        found = {name: sorted(group, key=_chance)[:most] for name, group in found.items()}
    return found, bad


def _chance(case: Case) -> float:
    return share_of(case.key or case.text)


def _take(file: sources.SourceFile, config: RunConfig, found: Rows, bad: list[str]) -> None:
    """Adds the rows of a file."""
    for row, record in rows_of(file, config):
        right = record.pair.split(SEPARATOR)[0]  # hard negatives are for training
        reason = record.reason or ("empty" if is_unseen(record.text) or (right and is_unseen(right)) else "")
        if not reason:
            case = Case(record.text, right, file.uri, row, record.key, record.item)
            found.setdefault(record.language, []).append(case)
            continue
        if not file.language_column or record.language != file.fallback:  # else it names no language
            found.setdefault(record.language, [])
        bad.append(f"{file.uri}: row {row} cannot be scored: {reason}")
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


def without_rows(config: RunConfig, rows: Rows) -> dict[str, str]:
    """Why a language of the corpus, or of a test set, has no figure."""
    reason = "no test rows: the corpus has it, and evaluation.sources holds no row in it"
    told = {*config.corpus.languages, *_languages_of(config), *_counted(config)}
    asked = config.objective.heads  # of a model of several tasks those that are judged
    named = {
        name: reason
        for name in sorted(told)
        if name not in rows and (not asked or languages.task(name) in asked)
    }
    barren = [name for name, group in rows.items() if not group]
    return {**named, **dict.fromkeys(barren, "no test rows: its files hold none that can be scored")}


def _languages_of(config: RunConfig) -> set[str]:
    """Languages of the corpus by its sources, and by the names of its files where they can be listed from here."""
    told = {
        f"{source.task}:{tag}" if source.task else tag
        for source in config.corpus.sources
        if (tag := languages.normalize(source.language or ""))
    }
    with contextlib.suppress(ConfigError, access.StorageError):
        told |= {
            file.fallback
            for file in sources.list_files(config.corpus.sources, config.storage)
            if file.language
        }
    return told


def _counted(config: RunConfig) -> set[str]:
    """Languages whose documents the training has counted, where the weights lie in their checkpoint or run."""
    weights = storage.absolute(config.adapter.path or config.model.path or "")
    folder = weights.rstrip("/").rpartition("/")[0]
    for name in ("progress.json", "report.json"):  # of a checkpoint; of a run, for its `merged`
        with contextlib.suppress(access.StorageError, ConfigError, ValueError, LookupError, TypeError):
            counted = json.loads(storage.read_bytes(storage.join(folder, name), config.storage))["documents"]
            place = storage.join(folder, "config.yaml")
            trained = configuration.parse(storage.read_bytes(place, config.storage).decode(), place)
            if trained.objective.name != config.objective.name:
                return set()  # it was the backbone's
            return set(counted)
    return set()
