"""What the corpus holds: chunks, good documents per language, the held-out rows, and what was refused.

Built once by a streaming pass and kept beside the run; every later stage is a function of it. Held-out
documents are those with the smallest content hashes of their language, so every copy of a held-out text is
held out with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass

import numpy as np

from mlray import storage
from mlray.config import ConfigError, Corpus, Storage
from mlray.corpus import lines
from mlray.corpus.sources import SourceFile

CHUNK_BYTES = 16 << 20
_FORM = 2
"""Of `manifest.json`."""


@dataclass(frozen=True)
class Part:
    """The documents of one language in one chunk: raw rows less bad and held-out ones."""

    language: str
    documents: int
    characters: int
    held_out: tuple[int, ...]
    """Raw rows that belong to validation."""


@dataclass(frozen=True)
class ChunkEntry:
    """A chunk and its parts; its place in the manifest is the upper half of its documents' ids."""

    chunk: lines.Chunk
    parts: tuple[Part, ...]
    digest: str = ""
    """Hash of its good documents and their rows."""


@dataclass(frozen=True)
class HeldOut:
    """A validation document."""

    language: str
    text: str
    pair: str


@dataclass(frozen=True)
class Refused:
    """A record, or the rest of a file, that cannot be used."""

    uri: str
    position: str
    language: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The corpus as the stream sees it."""

    chunks: tuple[ChunkEntry, ...]
    held_out: tuple[HeldOut, ...]
    refused: tuple[Refused, ...]
    fingerprint: str

    @property
    def digest(self) -> str:
        """Hash of the documents in their order: equal where a position means the same, wherever the files lie."""
        rows = [[entry.digest, [astuple(part) for part in entry.parts]] for entry in self.chunks]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def languages(self) -> list[str]:
        """Languages with training documents, ordered; a document's language number is its place here."""
        return sorted({part.language for entry in self.chunks for part in entry.parts if part.documents})

    def documents(self) -> dict[str, int]:
        """Training documents per language."""
        return self._sums("documents")

    def characters(self) -> dict[str, int]:
        """Characters of the training documents per language."""
        return self._sums("characters")

    def refused_counts(self) -> dict[str, dict[str, int]]:
        """Refused records: language -> reason -> count."""
        counts: dict[str, dict[str, int]] = {}
        for entry in self.refused:
            reasons = counts.setdefault(entry.language, {})
            reasons[entry.reason] = reasons.get(entry.reason, 0) + 1
        return counts

    def _sums(self, attribute: str) -> dict[str, int]:
        sums = dict.fromkeys(self.languages, 0)
        for entry in self.chunks:
            for part in entry.parts:
                if part.documents:
                    sums[part.language] += int(getattr(part, attribute))
        return sums


def check_languages(manifest: Manifest, wanted: Iterable[str]) -> None:
    """Refuses a corpus that lacks a language.

    Raises:
        ConfigError: `corpus.languages` names one without training documents.
    """
    found = manifest.languages
    for language in wanted:
        if language not in found:
            raise ConfigError(
                f"corpus.languages asks for {language!r}, which has no rows; found: {', '.join(found)}; "
                "add a source for it or leave it out"
            )


def fingerprint(files: list[SourceFile], corpus: Corpus) -> str:
    """Hash of everything the manifest depends on: files with their ETags, column mapping, limits."""
    parts = [json.dumps(asdict(file), sort_keys=True) for file in files]
    parts.append(f"{corpus.max_chars} {corpus.validation_rows} {CHUNK_BYTES}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def save(manifest: Manifest, folder: str, settings: Storage) -> None:
    """Writes `manifest.json` and `quarantine.jsonl` below `folder`; the manifest last, as it marks the end."""
    lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in manifest.refused)
    storage.write_bytes(storage.join(folder, "quarantine.jsonl"), lines.encode(), settings)
    # One file may be read in several ways, such as beside two others.
    files = dict.fromkeys(entry.chunk.file for entry in manifest.chunks)
    numbers = {file: number for number, file in enumerate(files)}
    body = {
        "form": _FORM,
        "fingerprint": manifest.fingerprint,
        "files": [asdict(file) for file in files],
        "chunks": [_chunk_row(entry, numbers) for entry in manifest.chunks],
        "held_out": [[entry.language, entry.text, entry.pair] for entry in manifest.held_out],
        "refused": [list(asdict(entry).values()) for entry in manifest.refused],
    }
    data = json.dumps(body, ensure_ascii=False).encode()
    storage.write_bytes(storage.join(folder, "manifest.json"), data, settings)


def load(folder: str, settings: Storage) -> Manifest | None:
    """The manifest below `folder`, or None if there is none yet, or that of another version."""
    uri = storage.join(folder, "manifest.json")
    if not storage.exists(uri, settings):
        return None
    body = json.loads(storage.read_bytes(uri, settings))
    if body.get("form") != _FORM:
        return None
    files = [SourceFile.of(file) for file in body["files"]]
    entries = []
    for number, start, stop, digest, parts in body["chunks"]:
        chunk = lines.Chunk(files[number], start, stop)
        entries.append(
            ChunkEntry(chunk, tuple(Part(a, b, c, tuple(rows)) for a, b, c, rows in parts), digest)
        )
    held_out = tuple(HeldOut(*row) for row in body["held_out"])
    return Manifest(
        tuple(entries), held_out, tuple(Refused(*row) for row in body["refused"]), body["fingerprint"]
    )


def part_sizes(manifest: Manifest, language: str) -> tuple[np.ndarray, np.ndarray]:
    """Chunk numbers that hold the language, and its documents in each (both int64, same length)."""
    pairs = [
        (number, part.documents)
        for number, entry in enumerate(manifest.chunks)
        for part in entry.parts
        if part.language == language and part.documents
    ]
    numbers, sizes = zip(*pairs, strict=True)
    return np.array(numbers, dtype=np.int64), np.array(sizes, dtype=np.int64)


def _chunk_row(entry: ChunkEntry, numbers: dict[SourceFile, int]) -> list[object]:
    parts = [[part.language, part.documents, part.characters, part.held_out] for part in entry.parts]
    return [numbers[entry.chunk.file], entry.chunk.start, entry.chunk.stop, entry.digest, parts]
