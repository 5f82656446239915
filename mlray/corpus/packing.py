"""Packs documents into rows of fixed length: every token once, no document across two rows unless it is longer
than one.

Shape letters: B rows, T tokens of a row, D documents (or pieces of documents) of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from mlray.corpus.windows import Window
from mlray.schema import NO_TARGET, PackedBatch, packed_schema


class TextEncoder(Protocol):
    """What packing needs of a tokenizer."""

    @property
    def start_id(self) -> int:
        """Token before a text."""
        ...

    @property
    def end_id(self) -> int:
        """Token after a text."""
        ...

    @property
    def pad_id(self) -> int:
        """Token that fills a row."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ...


class Piece(NamedTuple):
    """Tokens that must lie in one row: a document, or a part of one that is longer than a row."""

    tokens: list[int]
    language: int
    document: int
    targets: list[int] | None = None
    """As long as `tokens`."""
    texts: tuple[tuple[int, int], ...] = ()
    """Of a piece with a row of its own, as a pair has it: length and name of each text in `tokens`."""
    item: int = 0
    """Of such a piece: a number of what it is about; 0 if that is not known."""


class Cutter(Protocol):
    """What turns the documents of a window into pieces; an objective's own."""

    @property
    def encoder(self) -> TextEncoder:
        """The tokenizer; its padding fills the rows."""
        ...

    def __call__(self, window: Window) -> list[Piece]:
        """Pieces of at most a row's length."""
        ...


@dataclass(frozen=True)
class Texts:
    """Cuts texts (and pairs, as one text after the other) into pieces without targets."""

    encoder: TextEncoder
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """See `pieces`."""
        return pieces(window, self.encoder, self.sequence_length)


def pieces(window: Window, encoder: TextEncoder, sequence_length: int) -> list[Piece]:
    """Tokenised documents with their special tokens, cut where they are longer than a row.

    A text becomes `<start> text <end>`; a pair `<start> text <end> translation <end>`, cut in both halves
    alike.
    """
    texts = encoder.encode(window.text)
    paired = [i for i, pair in enumerate(window.pair) if pair]
    pairs = dict(zip(paired, encoder.encode([window.pair[i] for i in paired]), strict=True)) if paired else {}
    start, end = encoder.start_id, encoder.end_id
    result: list[Piece] = []
    for i, tokens in enumerate(texts):
        language, document = window.language[i], window.document[i]
        other = pairs.get(i)
        room = sequence_length - (2 if other is None else 3)
        if other is None and len(tokens) <= room:
            result.append(Piece([start, *tokens, end], language, document))
            continue
        parts = max(-(-(len(tokens) + len(other or ())) // room), 1)
        while other is not None and _largest(len(tokens), parts) + _largest(len(other), parts) > room:
            parts += 1
        for part in range(parts):
            body = [start, *_cut(tokens, part, parts), end]
            if other is not None:
                body += [*_cut(other, part, parts), end]
            result.append(Piece(body, language, document))
    return result


def _cut(tokens: list[int], part: int, parts: int) -> list[int]:
    return tokens[len(tokens) * part // parts : len(tokens) * (part + 1) // parts]


def _largest(length: int, parts: int) -> int:
    return -(-length // parts)


def best_fit(lengths: Sequence[int], sequence_length: int) -> list[list[int]]:
    """Assigns items to rows by best-fit decreasing (Johnson 1973): returns the item numbers of each row.

    A bit set of the room that open rows have left finds the tightest row in constant time.

    Raises:
        ValueError: an item is longer than a row.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(sequence_length + 1)]
    available = 0
    for item in order:
        length = lengths[item]
        if length > sequence_length:
            raise ValueError(f"an item of {length} tokens does not fit into a row of {sequence_length}")
        fitting = available >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                available &= ~(1 << room)
        else:
            room, row = sequence_length, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := room - length:
            open_rows[left].append(row)
            available |= 1 << left
    return rows


def _rows(items: list[Piece], sequence_length: int) -> list[list[int]]:
    """The items of each row: alone where they are to be, else as tight as they fit."""
    if any(item.texts for item in items):
        return [[number] for number in range(len(items))]
    return best_fit([len(item.tokens) for item in items], sequence_length)


def pack(window: Window, cutter: Cutter, sequence_length: int, seed: int) -> pa.Table:
    """Packed rows of a window in a seeded order (schema: `schema.packed_schema`)."""
    return pack_pieces(cutter(window), cutter.encoder.pad_id, sequence_length, window.number, seed)


def pack_pieces(items: list[Piece], pad_id: int, sequence_length: int, window: int, seed: int) -> pa.Table:
    """As `pack`, from pieces."""
    rows = _rows(items, sequence_length)
    order = np.random.default_rng([seed, 3, window]).permutation(len(rows))
    placed = [items[i] for number in order for i in rows[number]]
    texts = [item.texts or ((len(item.tokens), item.document),) for item in placed]
    texts_of = np.array([len(own) for own in texts], dtype=np.int64)
    rows_of_pieces = np.repeat(np.arange(len(rows)), [len(rows[number]) for number in order])
    counts = np.bincount(rows_of_pieces, weights=texts_of, minlength=len(rows)).astype(np.int64)
    lengths = np.array([length for own in texts for length, _ in own], dtype=np.int32)
    row_of = np.repeat(np.arange(len(rows)), counts)
    filled = np.bincount(row_of, weights=lengths, minlength=len(rows)).astype(np.int64)
    first = np.cumsum(filled) - filled
    rows_of_tokens = np.repeat(np.arange(len(rows)), filled)
    columns_of_tokens = np.arange(filled.sum()) - first[rows_of_tokens]

    def spread(values: Iterable[list[int]], fill: int) -> pa.Array:
        table = np.full((len(rows), sequence_length), fill, dtype=np.int32)
        table[rows_of_tokens, columns_of_tokens] = np.fromiter(
            itertools.chain.from_iterable(values), np.int32
        )
        return pa.FixedSizeListArray.from_arrays(pa.array(table.ravel()), sequence_length)

    targets = [item.targets for item in placed if item.targets is not None]
    apart = any(item.texts for item in placed)  # a piece a row
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())

    def per_row(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind))

    return pa.table(
        [
            np.full(len(rows), window, dtype=np.int64),
            np.arange(len(rows), dtype=np.int32),
            spread((item.tokens for item in placed), pad_id),
            per_row(lengths, pa.int32()),
            per_row(np.repeat([item.language for item in placed], texts_of), pa.int16()),
            per_row(np.array([name for own in texts for _, name in own]), pa.int64()),
            *([spread(targets, NO_TARGET)] if targets else []),
            *([np.array([item.item for item in placed], np.int64)] if apart else []),
        ],
        schema=packed_schema(sequence_length, targets=bool(targets), items=apart),
    )


def unpack(table: pa.Table) -> PackedBatch:
    """Packed rows as arrays."""
    table = table.combine_chunks()
    tokens_BT = _square(table, "tokens")
    T = tokens_BT.shape[1]
    lists = _chunk(table, "lengths")
    lengths_D = lists.flatten().to_numpy()
    documents_B = np.diff(lists.offsets.to_numpy())
    batch_D = np.repeat(np.arange(len(table)), documents_B)
    segments_BT, offsets_BT = _places(lengths_D, batch_D, documents_B, T)
    return PackedBatch(
        tokens_BT=tokens_BT,
        segments_BT=segments_BT,
        offsets_BT=offsets_BT,
        window_B=_chunk(table, "window").to_numpy(),
        row_B=_chunk(table, "row").to_numpy(),
        lengths_D=lengths_D,
        languages_D=_chunk(table, "languages").flatten().to_numpy(),
        documents_D=_chunk(table, "documents").flatten().to_numpy(),
        batch_D=batch_D,
        targets_BT=_square(table, "targets") if "targets" in table.column_names else None,
        item_B=_chunk(table, "item").to_numpy() if "item" in table.column_names else None,
    )


def _places(
    lengths_D: np.ndarray, batch_D: np.ndarray, documents_B: np.ndarray, T: int
) -> tuple[np.ndarray, np.ndarray]:
    """Document number (from 1) and place in the document (from 0) of every token; both 0 on padding."""
    B, D = len(documents_B), len(lengths_D)
    ends_D = np.cumsum(lengths_D)
    starts_D = ends_D - lengths_D
    row_starts_B = np.zeros(B, dtype=np.int64)
    np.cumsum(
        np.bincount(batch_D, weights=lengths_D, minlength=B)[:-1].astype(np.int64), out=row_starts_B[1:]
    )
    first_B = np.cumsum(documents_B) - documents_B
    number_D = np.arange(D) - first_B[batch_D] + 1
    total = int(ends_D[-1]) if D else 0
    within = np.arange(total)
    rows = np.repeat(batch_D, lengths_D)
    columns = within - row_starts_B[rows]
    segments_BT = np.zeros((B, T), dtype=np.int32)
    offsets_BT = np.zeros((B, T), dtype=np.int32)
    segments_BT[rows, columns] = np.repeat(number_D, lengths_D)
    offsets_BT[rows, columns] = within - np.repeat(starts_D, lengths_D)
    return segments_BT, offsets_BT


def _square(table: pa.Table, name: str) -> np.ndarray:
    column = _chunk(table, name)
    values: np.ndarray = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
    return values


def _chunk(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
