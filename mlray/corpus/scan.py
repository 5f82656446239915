"""The streaming pass that builds the manifest: files are read side by side, their fragments put together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from mlray.access import StorageError
from mlray.config import ConfigError, Corpus, Storage
from mlray.corpus import lines, records
from mlray.corpus.fields import Record
from mlray.corpus.manifest import CHUNK_BYTES, ChunkEntry, HeldOut, Manifest, Part, Refused
from mlray.corpus.sources import SourceFile


@dataclass
class _Candidates:
    """The documents of a language with the smallest content hashes: hash -> (text, pair, rows)."""

    limit: int
    kept: dict[int, tuple[str, str, list[tuple[int, int]]]] = field(default_factory=dict)
    bound: int = 1 << 64

    def offer(self, text: str, pair: str, place: tuple[int, int]) -> None:
        """Considers one document at (chunk, row)."""
        digest = content_hash(text, pair)
        if digest > self.bound:
            return
        self.kept.setdefault(digest, (text, pair, []))[2].append(place)
        if len(self.kept) > 2 * self.limit:
            self.trim()

    def trim(self) -> None:
        """Forgets all but the `limit` smallest hashes."""
        self.kept = dict(sorted(self.kept.items())[: self.limit])
        if len(self.kept) == self.limit:
            self.bound = max(self.kept, default=0)


def content_hash(text: str, pair: str) -> int:
    """64 bits of BLAKE2b over text and translation, in whatever order: both directions hold out the same pairs."""
    key = "\x00".join(sorted((text, pair)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def read_file(file: SourceFile, max_chars: int, validation_rows: int, settings: Storage) -> bytes:
    """Reads one file and returns its fragment of the manifest (JSON); runs in a Ray Data task.

    Raises:
        StorageError: the file cannot be reached.
    """
    refused: list[Refused] = []
    candidates: dict[str, _Candidates] = {}
    try:
        cuts = records.chunks(file, CHUNK_BYTES, settings)
    except lines.BrokenChunk as error:
        cuts = []
        refused.append(Refused(file.uri, "file", file.fallback, str(error)))
    entries = []
    for number, chunk in enumerate(cuts):
        counts: dict[str, list[int]] = {}
        digest = hashlib.blake2b(digest_size=16)
        for record in _records(chunk, max_chars, settings, refused):
            count = counts.setdefault(record.language, [0, 0])
            count[0] += 1
            count[1] += len(record.text) + len(record.pair)
            digest.update("\x1f".join(map(str, record)).encode())
            if validation_rows:
                kept = candidates.setdefault(record.language, _Candidates(validation_rows))
                kept.offer(record.text, record.pair, (number, record.row))
        entries.append(
            {"start": chunk.start, "stop": chunk.stop, "counts": counts, "digest": digest.hexdigest()}
        )
    for kept in candidates.values():
        kept.trim()
    fragment = {
        "chunks": entries,
        "refused": [asdict(entry) for entry in refused],
        "candidates": {language: list(kept.kept.items()) for language, kept in candidates.items()},
    }
    return json.dumps(fragment, ensure_ascii=False).encode()


def _records(
    chunk: lines.Chunk, max_chars: int, settings: Storage, refused: list[Refused]
) -> Iterator[Record]:
    """The good records of a chunk; the others are appended to `refused`."""
    row = -1
    uri = chunk.file.uri
    try:
        for batch in records.read(chunk, max_chars, settings):
            for record in batch:
                row = record.row
                if record.reason:
                    refused.append(Refused(uri, where(chunk, row), record.language, record.reason))
                else:
                    yield record
    except lines.BrokenChunk as error:
        place = f"after {where(chunk, row)}" if row >= 0 else where(chunk, 0)
        refused.append(Refused(uri, place, chunk.file.fallback, str(error)))


def merge(
    files: list[SourceFile], fragments: Iterable[tuple[int, bytes]], corpus: Corpus, manifest_fingerprint: str
) -> Manifest:
    """Puts the fragments (file number, JSON) together, in any order, and chooses the held-out documents.

    Raises:
        ConfigError: no documents at all.
        StorageError: a file could not be reached.
    """
    parsed = {number: _parse(data) for number, data in fragments}
    totals: Counter[str] = Counter()
    for fragment in parsed.values():
        for chunk in fragment["chunks"]:
            totals.update({language: documents for language, (documents, _) in chunk["counts"].items()})
    if not totals.total():
        reasons = Counter(entry["reason"] for fragment in parsed.values() for entry in fragment["refused"])
        often = f"; most were refused: {reasons.most_common(1)[0][0]}" if reasons else ""
        raise ConfigError(
            f"the corpus is empty: no usable record in {len(files)} files; check corpus.sources[].text and language"
            + often
        )
    held, taken = _choose(_by_hash(parsed), totals, corpus.validation_rows)
    entries = []
    for number in sorted(parsed):
        for place, chunk in enumerate(parsed[number]["chunks"]):
            parts = []
            for language, (documents, characters) in sorted(chunk["counts"].items()):
                held_out = sorted(taken.get((number, place, language), ()))
                rows = tuple(row for row, _ in held_out)
                left = characters - sum(length for _, length in held_out)
                parts.append(Part(language, documents - len(rows), left, rows))
            piece = lines.Chunk(files[number], chunk["start"], chunk["stop"])
            entries.append(ChunkEntry(piece, tuple(parts), chunk["digest"]))
    refused = [Refused(**entry) for number in sorted(parsed) for entry in parsed[number]["refused"]]
    return Manifest(tuple(entries), tuple(held), tuple(refused), manifest_fingerprint)


def _parse(data: bytes) -> dict[str, Any]:
    fragment: dict[str, Any] = json.loads(data)
    if "fault" in fragment:
        raise StorageError(fragment["fault"])
    return fragment


def where(chunk: lines.Chunk, row: int) -> str:
    """Where a row stands in its file, for a person."""
    unit = "row group" if chunk.file.format == "parquet" else "byte"
    return f"row {row} from {unit} {chunk.start}" if chunk.start else f"row {row}"


_Copies = list[tuple[str, str, list[tuple[int, int, int]]]]
"""(text, translation, [(file, chunk of the file, row)]) of each file that holds a document with the same hash."""


def _by_hash(parsed: dict[int, Any]) -> dict[str, dict[int, _Copies]]:
    """The candidates of all files: language -> content hash -> copies."""
    merged: dict[str, dict[int, _Copies]] = {}
    for number in sorted(parsed):
        for language, entries in parsed[number]["candidates"].items():
            by_hash = merged.setdefault(language, {})
            for digest, (text, pair, places) in entries:
                by_hash.setdefault(digest, []).append((text, pair, [(number, *place) for place in places]))
    return merged


def _choose(
    merged: dict[str, dict[int, _Copies]], totals: Counter[str], validation_rows: int
) -> tuple[list[HeldOut], dict[tuple[int, int, str], list[tuple[int, int]]]]:
    """Held-out documents, at most a tenth of a language, and what they take.

    Only the `validation_rows` smallest hashes are considered: of those every file has told all its copies.

    Returns:
        The documents, and (file, chunk, language) -> [(row, characters)].
    """
    held: list[HeldOut] = []
    taken: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
    for language in sorted(merged):
        budget = min(validation_rows, totals[language] // 10)
        for _, copies in sorted(merged[language].items())[:validation_rows]:
            places = [place for _, _, rows in copies for place in rows]
            if budget < len(places):
                continue  # a text with many copies stays in training as a whole
            budget -= len(places)
            held.append(HeldOut(language, copies[0][0], copies[0][1]))
            for number, chunk, row in places:
                length = len(copies[0][0]) + len(copies[0][1])
                taken.setdefault((number, chunk, language), []).append((row, length))
    return held, taken
