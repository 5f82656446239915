"""Which test rows stand in the training text: exactly, nearly, or as a translation.

What nearly is the same text: `mlray.evaluation.duplicates`. The test set is indexed and the training text streams past
it once, so memory follows the test set alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from itertools import islice, zip_longest
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlray import languages, storage
from mlray.config import ConfigError, Objective, RunConfig, Source
from mlray.console import left_out
from mlray.corpus import lines, sources, testsets
from mlray.corpus.cleaning import fold
from mlray.corpus.testsets import Case
from mlray.evaluation import duplicates
from mlray.evaluation.duplicates import Duplicates
from mlray.objectives.checks import guarded
from mlray.objectives.table import OBJECTIVES

EXACT, NEAR, TRANSLATED = "exact", "near", "translated"
_EXAMPLES = 3
_NO_ID = {"", "nan", "None"}
"""A missing one; a column of numbers writes it as NaN."""
Space = tuple[str, str]
"""Data set and column of an id: of another set, or in another column, the same id is another row's."""


@dataclass(frozen=True)
class Example:
    """A test row and a training row that match; files and row numbers from 0, never the text itself."""

    kind: str
    test: str
    test_row: int
    training: str
    training_row: int


@dataclass(frozen=True)
class Cell:
    """The test rows of a language, and how many of them stand in the training text."""

    rows: int
    exact: int
    """The same text but for case, punctuation and white space."""
    near: int
    """Not exact, but nearly the same text."""
    translated: int | None
    """Their translation is there: by its text, or by the id (`part_by`) that a row shares with its translations in the
    same data set. None where the test rows have neither a translation beside them nor an id."""
    leaked: int
    """Any of the three."""
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Leakage:
    """Language of the test set -> what leaked, and what was read."""

    about: dict[str, Any]
    cells: dict[str, Cell]

    def to_json(self) -> str:
        """The whole result."""
        cells = {language: asdict(cell) for language, cell in self.cells.items()}
        return json.dumps({"about": self.about, "cells": cells}, ensure_ascii=False, indent=1)


class Index:
    """The test rows as training texts are matched with them; the pair of a row is its translation, or empty.

    `spaces` are those of the ids in each file.
    """

    def __init__(self, rows: testsets.Rows, spaces: Mapping[str, Set[Space]]) -> None:
        self._languages = list(rows)
        self.cases: list[tuple[str, Case]] = [
            (language, case) for language, group in rows.items() for case in group
        ]
        self.found: dict[str, dict[int, Example]] = {EXACT: {}, NEAR: {}, TRANSLATED: {}}
        """Kind -> number of the test row -> where it was met first."""
        self._texts: dict[str, list[int]] = {}
        self._pairs: dict[str, list[int]] = {}
        self._ids: dict[tuple[Space, str], list[int]] = {}
        for number, (_, case) in enumerate(self.cases):
            self._texts.setdefault(fold(case.text), []).append(number)
            if case.pair:
                self._pairs.setdefault(fold(case.pair), []).append(number)
            if _is_id(case.key):
                for space in spaces[case.file]:
                    self._ids.setdefault((space, case.key), []).append(number)
        self._duplicates = Duplicates(self._texts)

    def meet(self, text: str, file: str, row: int, *, is_translation: bool = False) -> None:
        """Matches a training text, or the translation beside one, with every test row."""
        folded = fold(text)
        same = self._texts.get(folded, [])
        self._note(EXACT, same, file, row)
        self._note(TRANSLATED, self._pairs.get(folded, []), file, row)
        if is_translation:
            self._note(TRANSLATED, same, file, row)
        for other in self._duplicates.of(folded):
            self._note(NEAR, self._texts[other], file, row)

    def meet_id(self, key: str, space: Space, file: str, row: int) -> None:
        """Matches the id of a training row with those of the test rows."""
        self._note(TRANSLATED, self._ids.get((space, key), []), file, row)

    def cells(self) -> dict[str, Cell]:
        """What was found, by language; also of one without rows."""
        numbers: dict[str, list[int]] = {language: [] for language in self._languages}
        for number, (language, _) in enumerate(self.cases):
            numbers[language].append(number)
        return {language: self._cell(own) for language, own in numbers.items()}

    def _cell(self, numbers: list[int]) -> Cell:
        exact, near, translated = ([i for i in numbers if i in found] for found in self.found.values())
        near = [i for i in near if i not in self.found[EXACT]]
        met = [
            [self.found[kind][i] for i in own]
            for kind, own in zip(self.found, (exact, near, translated), strict=True)
        ]
        examples = (example for turn in zip_longest(*met) for example in turn if example)
        leaked = len({*exact, *near, *translated})
        checked = any(self.cases[number][1].pair or _is_id(self.cases[number][1].key) for number in numbers)
        return Cell(
            len(numbers),
            len(exact),
            len(near),
            len(translated) if checked or translated else None,
            leaked,
            tuple(islice(examples, _EXAMPLES)),
        )

    def _note(self, kind: str, numbers: list[int], file: str, row: int) -> None:
        for number in numbers:
            if number not in self.found[kind]:
                case = self.cases[number][1]
                self.found[kind][number] = Example(kind, case.file, case.row, file, row)


def _is_id(key: str) -> bool:
    return key.strip() not in _NO_ID


def translation_of(language: str, pair: str, objective: Objective) -> str:
    """The translation that belongs to a text; empty if that is a label, also in a language called `de-ba`."""
    labelled = OBJECTIVES[objective.name].labels_of is not None
    return pair if languages.is_direction(language) and not labelled else ""


def check(config: RunConfig, *, show_progress: bool = True) -> Leakage:
    """What of `evaluation.sources` stands in `corpus.sources` as training reads them.

    The rows that training refuses, bad or because of `corpus.without_tests`, are skipped and counted.

    Raises:
        ConfigError: there is no training or no test source, or a test row is bad.
        StorageError: a file cannot be reached.
    """
    if not config.corpus.sources:
        raise ConfigError(
            "corpus.sources is empty; name the training text that the test sets are to be kept out of"
        )
    groups, left_out = testsets.read(config, distinct=OBJECTIVES[config.objective.name].distinct)
    spaces: dict[str, set[Space]] = {}
    for file, space in _files(config.evaluation.sources, config).items():
        spaces.setdefault(file.uri, set()).add(space)  # two sources may read it by two columns
    index = Index(
        {
            language: [
                case._replace(pair=translation_of(language, case.pair, config.objective)) for case in group
            ]
            for language, group in sorted(groups.items())
        },
        spaces,
    )
    counts = {"training_rows": 0, "skipped": 0}
    files = _files(config.corpus.sources, config)
    off = not (show_progress and sys.stderr.isatty())
    with storage.staging() as stage:
        read = guarded(list(files), config, str(stage))
        shown = track(read, "training files", console=Console(stderr=True), transient=True, disable=off)
        for file, space in zip(shown, files.values(), strict=True):
            for row, text, pair, key in _training(file, config, counts):
                index.meet(text, file.uri, row)
                index.meet_id(key, space, file.uri, row)
                if pair:
                    index.meet(pair, file.pair_uri or file.uri, row, is_translation=True)
    about = {
        **counts,
        "left_out": left_out,
        "training": [source.uri for source in config.corpus.sources],
        "test": [source.uri for source in config.evaluation.sources],
        "near": duplicates.CRITERION,
    }
    return Leakage(about, index.cells())


def _files(wanted: tuple[Source, ...], config: RunConfig) -> dict[sources.SourceFile, Space]:
    """The files of sources, and what the ids in each are told apart by."""
    found: dict[sources.SourceFile, Space] = {}
    for source in wanted:
        for file in testsets.files_of((source,), config):
            found.setdefault(file, (_data_set(source.uri, file.uri), source.part_by or ""))
    return found


def _data_set(source: str, file: str) -> str:
    """The folder that a source names or its one file lies in; of `hf://` the name without configuration and split."""
    if source.startswith("hf://"):
        return ":".join(source.split(":")[:2])
    place = storage.absolute(source).rstrip("/")
    return place.rpartition("/")[0] if place == file else place


def _training(
    file: sources.SourceFile, config: RunConfig, counts: dict[str, int]
) -> Iterator[tuple[int, str, str, str]]:
    """(row, text, translation or nothing, id or nothing) of the rows that training takes; a damaged rest of a file
    counts as one that it refuses."""
    try:
        for row, record in testsets.rows_of(file, config):
            counts["skipped" if record.reason else "training_rows"] += 1
            if not record.reason:
                pair = translation_of(record.language, record.pair, config.objective)
                yield row, record.text, pair, record.key
    except lines.BrokenChunk:
        counts["skipped"] += 1


def show(leakage: Leakage, console: Console) -> None:
    """Prints a row for each language, and where the examples stand."""
    table = Table(title="test rows that stand in the training text", title_justify="left")
    for heading in ("language", "rows", "exact", "near", "translated", "any", "share"):
        table.add_column(heading, justify="left" if heading == "language" else "right")
    for language, cell in leakage.cells.items():
        counts = (cell.rows, cell.exact, cell.near, cell.translated, cell.leaked)
        shown = ("-" if count is None else f"{count:,}" for count in counts)
        table.add_row(language, *shown, f"{cell.leaked / cell.rows:.1%}" if cell.rows else "-")
    console.print(table)
    for language, cell in leakage.cells.items():
        for example in cell.examples:
            console.print(
                f"{language} {example.kind}: row {example.test_row} of {example.test}, "
                f"row {example.training_row} of {example.training}",
                soft_wrap=True,
                markup=False,
            )
    read, skipped = leakage.about["training_rows"], leakage.about["skipped"]
    console.print(f"{read:,} training rows were read, and {skipped:,} that training refuses were skipped")
    if bad := leakage.about["left_out"]:
        console.print(left_out(bad, "bad test rows"), markup=False)
