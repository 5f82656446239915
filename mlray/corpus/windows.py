"""Reads windows: the text of a window's documents, in the window's own shuffled order.

`WindowReader.read` is a pure function of the window number. Cursors that stay open between calls only make it cheap:
windows that are read in order read every byte once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from mlray.access import StorageError
from mlray.config import Storage
from mlray.corpus import lines, records
from mlray.corpus.fields import Record
from mlray.corpus.manifest import Manifest
from mlray.corpus.mixture import Mixture, Slice

DOCUMENT_ROW_BITS = 32


@dataclass
class Window:
    """Documents of a window as parallel lists."""

    number: int
    text: list[str]
    pair: list[str]
    language: list[int]
    document: list[int]
    """Chunk number x 2^32 + raw row: names a document of the corpus for ever."""
    item: list[int] = field(default_factory=list)
    """`Record.item` of each; empty: they have none."""
    source: list[int] = field(default_factory=list)
    """Which of `corpus.sources` each comes from."""


class _Cursor:
    """The training documents of one language in one chunk, from first to last."""

    def __init__(
        self, manifest: Manifest, chunk: int, language: str, max_chars: int, settings: Storage
    ) -> None:
        entry = manifest.chunks[chunk]
        held_out = next(frozenset(part.held_out) for part in entry.parts if part.language == language)
        self.chunk = chunk
        self.next = 0
        self._rows = self._documents(records.read(entry.chunk, max_chars, settings), language, held_out)

    @staticmethod
    def _documents(
        batches: Iterator[list[Record]], language: str, held_out: frozenset[int]
    ) -> Iterator[Record]:
        for batch in batches:
            for record in batch:
                if record.language == language and not record.reason and record.row not in held_out:
                    yield record

    def take(self, first: int, count: int) -> list[Record]:
        while self.next < first:
            next(self._rows)
            self.next += 1
        taken = [next(self._rows) for _ in range(count)]
        self.next += count
        return taken


class WindowReader:
    """Reads the windows of a mixture; not safe for several threads."""

    def __init__(self, manifest: Manifest, mixture: Mixture, max_chars: int, settings: Storage) -> None:
        self._manifest = manifest
        self.mixture = mixture
        self._max_chars = max_chars
        self._settings = settings
        self._cursors: dict[int, _Cursor] = {}

    def __getstate__(self) -> dict[str, object]:
        """Open cursors stay behind when a reader is sent to an actor: they only save time."""
        return {**self.__dict__, "_cursors": {}}

    def read(self, number: int) -> Window:
        """The documents of window `number`.

        Raises:
            StorageError: a file is gone, unreachable, or has fewer documents than when the manifest was
            built.
        """
        taken: list[tuple[int, int, Record]] = []
        for piece in self.mixture.window(number):
            taken += [(piece.language, piece.chunk, record) for record in self._take(piece)]
        order = np.random.default_rng([self.mixture.seed, 2, number]).permutation(len(taken))
        window = Window(number, [], [], [], [])
        for place in order:
            language, chunk, record = taken[place]
            window.text.append(record.text)
            window.pair.append(record.pair)
            window.language.append(language)
            window.document.append((chunk << DOCUMENT_ROW_BITS) + record.row)
            window.item.append(record.item)
            window.source.append(self._manifest.chunks[chunk].chunk.file.source)
        return window

    def _take(self, piece: Slice) -> list[Record]:
        cursor = self._cursors.get(piece.language)
        if cursor is None or cursor.chunk != piece.chunk or cursor.next > piece.first:
            language = self.mixture.languages[piece.language]
            cursor = _Cursor(self._manifest, piece.chunk, language, self._max_chars, self._settings)
            self._cursors[piece.language] = cursor
        try:
            return cursor.take(piece.first, piece.count)
        except StorageError:
            del self._cursors[piece.language]
            raise
        except (StopIteration, lines.BrokenChunk):
            del self._cursors[piece.language]
            uri = self._manifest.chunks[piece.chunk].chunk.file.uri
            raise StorageError(
                f"{uri} holds fewer documents than when the manifest was built; has it changed?"
            ) from None
