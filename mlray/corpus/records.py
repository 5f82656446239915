"""Reads the records of a chunk, in order, from any row on; a bad record never hides its neighbours.

A chunk is the unit that is opened: a parquet row group, a byte range of an uncompressed text or JSON-lines
file (cut at line ends), or a whole compressed file. `read` yields one entry a raw record, so row numbers
are stable whatever is bad.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlray import access, storage
from mlray.config import Storage
from mlray.corpus import fields, lines, tables
from mlray.corpus.cleaning import BadRecord, decode
from mlray.corpus.fields import Record
from mlray.corpus.lines import BrokenChunk, Chunk, first_line
from mlray.corpus.sources import SourceFile
from mlray.schema import SEPARATOR

_BATCH_ROWS = 2048
_MARGIN_BYTES = 1 << 16  # keys and other columns of a JSON line


def chunks(file: SourceFile, chunk_bytes: int, settings: Storage) -> list[Chunk]:
    """Cuts a file into chunks.

    Raises:
        BrokenChunk: the file is no parquet file.
        StorageError: it cannot be read.
    """
    if file.format == "parquet":
        try:
            with storage.open_input(file.uri, settings) as handle:
                footer = pq.ParquetFile(handle).metadata
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            access.raise_if_transport(error, file.uri, settings)
            raise BrokenChunk(f"not a readable parquet file: {first_line(error)}") from None
        groups = range(footer.num_row_groups)
        return [Chunk(file, group, footer.row_group(group).num_rows) for group in groups]
    if file.codec or file.pair_uri or file.format in tables.FORMATS:
        return [Chunk(file, 0, file.size)]
    cuts = range(0, file.size, chunk_bytes)
    return [Chunk(file, cut, min(cut + chunk_bytes, file.size)) for cut in cuts]


def read(chunk: Chunk, max_chars: int, settings: Storage) -> Iterator[list[Record]]:
    """Batches of records.

    Raises:
        BrokenChunk: after the last readable record, where the rest of the chunk is damaged.
        StorageError: the file is gone or unreachable.
    """
    if chunk.file.format == "parquet":
        batches = _read_parquet(chunk, max_chars, settings)
    else:
        parse = _parse_table if chunk.file.format in tables.FORMATS else _parse_lines
        if chunk.file.pair_uri:
            parse = _parse_aligned
        batches = _batched(parse(chunk, max_chars, settings))
    if chunk.file.without:
        batches = (_permitted(batch, chunk.file, settings) for batch in batches)
    if chunk.file.part == (0.0, 1.0) and chunk.file.rows is None:
        return batches
    # Records of other parts are left out; the rest keep the rows that they have in the file.
    return ([record for record in batch if record.reason != fields.OUTSIDE] for batch in batches)


def forbid(texts: Iterable[str], folder: str, settings: Storage) -> str:
    """Writes the hashes of texts that may stand in no row, for `SourceFile.without`; returns the file's place."""
    hashes = np.unique(np.array([fields.digest_of(text) for text in texts], dtype=np.int64))
    place = storage.join(folder, f"forbidden-{hashlib.sha256(hashes.tobytes()).hexdigest()[:16]}.i64")
    storage.write_bytes(place, hashes.tobytes(), settings)
    return place


@functools.lru_cache(maxsize=4)
def _forbidden(place: str, settings: Storage) -> frozenset[int]:
    return frozenset(np.frombuffer(storage.read_bytes(place, settings), np.int64).tolist())


def _permitted(batch: list[Record], file: SourceFile, settings: Storage) -> list[Record]:
    """The records of a batch; one with a forbidden text is refused."""
    known = _forbidden(file.without or "", settings)
    return [
        record._replace(text="", pair="", reason="stands in a test set")
        if not record.reason and any(fields.digest_of(text) in known for text in _texts(record, file))
        else record
        for record in batch
    ]


def _texts(record: Record, file: SourceFile) -> list[str]:
    return [record.text, *([] if file.labelled else record.pair.split(SEPARATOR))]


def _read_parquet(chunk: Chunk, max_chars: int, settings: Storage) -> Iterator[list[Record]]:
    file = chunk.file
    wanted = fields.columns(file)
    row = 0
    with storage.open_input(file.uri, settings) as handle:
        try:
            table = pq.ParquetFile(handle, page_checksum_verification=True)
            missing = [name for name in wanted if name not in table.schema_arrow.names]
            if missing:
                raise BrokenChunk(
                    f"no column {missing[0]!r}; the file has {', '.join(table.schema_arrow.names)}"
                )
            batches = table.iter_batches(_BATCH_ROWS, row_groups=[chunk.start], columns=wanted)
            for batch in batches:
                rows = zip(*(_values(batch.column(name)) for name in wanted), strict=True)
                yield [fields.record(row + i, list(cells), file, max_chars) for i, cells in enumerate(rows)]
                row += len(batch)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            access.raise_if_transport(error, file.uri, settings)
            raise BrokenChunk(f"damaged parquet page: {first_line(error)}") from None


def _values(column: pa.Array) -> list[object]:
    """Python values; a string that is no UTF-8 stays bytes, so that only its own row is bad."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        nested = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        raw = column.cast(pa.list_(pa.large_binary()) if nested else pa.large_binary())
        return [_decoded(value) for value in raw.to_pylist()]


def _decoded(value: object) -> object:
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value


def _batched(parsed: Iterator[Record | BrokenChunk]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in parsed:
        if isinstance(record, BrokenChunk):
            yield batch
            raise record
        batch.append(record)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _parse_lines(chunk: Chunk, max_chars: int, settings: Storage) -> Iterator[Record | BrokenChunk]:
    for row, line in enumerate(lines.split(chunk, _line_limit(chunk.file, max_chars), settings)):
        yield line if isinstance(line, BrokenChunk) else _parse_line(row, line, chunk.file, max_chars)


def _parse_table(chunk: Chunk, max_chars: int, settings: Storage) -> Iterator[Record | BrokenChunk]:
    file = chunk.file
    rows = tables.rows(chunk, fields.columns(file), _line_limit(file, max_chars), settings)
    try:
        for row, cells in enumerate(rows):
            if isinstance(cells, BadRecord):
                yield fields.bad(row, str(cells), file)
            else:
                yield fields.record(row, cells, file, max_chars)
    except BrokenChunk as error:
        yield error


def _parse_aligned(chunk: Chunk, max_chars: int, settings: Storage) -> Iterator[Record | BrokenChunk]:
    """Line k of one file and line k of the other; where one ends before the other, the rest cannot be trusted."""
    file = chunk.file
    limit = _line_limit(file, max_chars)
    both = (lines.split(Chunk(half, 0, half.size), limit, settings) for half in (file, file.other_half()))
    for row, (text, pair) in enumerate(itertools.zip_longest(*both)):
        if not isinstance(text, bytes) or not isinstance(pair, bytes):
            uneven = BrokenChunk(f"{file.uri} and {file.pair_uri} have different numbers of lines")
            yield next((half for half in (text, pair) if isinstance(half, BrokenChunk)), uneven)
            return
        yield _parse_pair(row, (text, pair), limit, file, max_chars)


def _parse_pair(
    row: int, halves: tuple[bytes, bytes], limit: int, file: SourceFile, max_chars: int
) -> Record:
    cells = [_half(half, limit, max_chars) for half in halves]
    return fields.record(row, _keyed(cells, file), file, max_chars)


def _keyed(halves: list[object], file: SourceFile) -> list[object]:
    """Of a line with two halves the cells, with the second once more where it decides on the part."""
    second = halves[1]
    return [*halves, second.strip() if isinstance(second, str) else second] if file.part_by else halves


def _half(line: bytes, limit: int, max_chars: int) -> object:
    try:
        if len(line) > limit:
            raise BadRecord(f"longer than {max_chars} characters")
        return decode(line.rstrip(b"\r")).removeprefix("\ufeff")
    except BadRecord as error:
        return error


def _line_limit(file: SourceFile, max_chars: int) -> int:
    """Bytes beyond which a line surely is too long: JSON may spell a character with twelve."""
    return 12 * max_chars * (len(file.columns) + bool(file.pair)) + _MARGIN_BYTES


def _parse_line(row: int, line: bytes, file: SourceFile, max_chars: int) -> Record:
    try:
        if len(line) > _line_limit(file, max_chars):
            raise BadRecord(f"longer than {max_chars} characters")
        text = decode(line.rstrip(b"\r")).removeprefix("\ufeff")
        if file.format == "jsonl":
            cells = _json_cells(text, file)
        elif file.pair:
            cells = _keyed(_tab_cells(text), file)
        else:
            cells = [text]
    except BadRecord as error:
        return fields.bad(row, str(error), file)
    return fields.record(row, cells, file, max_chars)


def _json_cells(text: str, file: SourceFile) -> list[object]:
    if not text.strip():
        raise BadRecord("empty")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):  # also a number of too many digits
        raise BadRecord("not JSON") from None
    if not isinstance(entry, dict):
        raise BadRecord(f"not a JSON object but {type(entry).__name__}")
    return [_value(entry, name) for name in fields.columns(file)]


def _value(entry: object, name: str) -> object:
    """A key's value; `text.de` is the key `de` inside `text`, unless there is a key of that name.

    In a list a key is a place, from 0: `names.de.0` is the first of the German names. Without it, the `BadRecord` that
    says so: its row may still have a text, and so a part.
    """
    key = name
    while isinstance(entry, dict | list):
        if isinstance(entry, list) and key.startswith("*."):
            found = [_value(part, key[2:]) for part in entry]
            return next((part for part in found if isinstance(part, BadRecord)), found)
        if isinstance(entry, list):
            entry = {str(place): value for place, value in enumerate(entry)}
        if key in entry:
            return entry[key]
        outer, _, key = key.partition(".")
        entry = entry.get(outer)
    return BadRecord(f"no key {name!r}")


def _tab_cells(text: str) -> list[object]:
    cells: list[object] = list(text.split("\t"))
    if len(cells) != 2:
        raise BadRecord(f"{len(cells)} tab-separated columns instead of 2")
    return cells
