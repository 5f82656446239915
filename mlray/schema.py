"""The only things that pass between stages, and their Arrow schemas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

WINDOW_SCHEMA = pa.schema(
    [
        ("window", pa.int64()),
        ("text", pa.list_(pa.large_string())),
        ("pair", pa.list_(pa.large_string())),
        ("language", pa.list_(pa.int16())),
        ("document", pa.list_(pa.int64())),
        ("item", pa.list_(pa.int64())),
        ("source", pa.list_(pa.int16())),
    ]
)
"""One window a row, so that no block boundary can ever cut it: parallel lists over its documents."""


SEPARATOR = "\x1e"
"""Between the second half of a pair and its hard negatives; `corpus.cleaning` leaves none inside a text."""
QUERY = "query:"
"""Stands before a word of a query in a session of items."""
NO_TARGET = -100
"""Where a target stands that is not to be predicted (the convention of torch and `transformers`)."""


def packed_schema(sequence_length: int, targets: bool = False, items: bool = False) -> pa.Schema:
    """Arrow schema of packed rows: `sequence_length` token ids and the documents that lie in them, in order.

    With `targets` a second list of that length lies beside the tokens, column for column; with `items` each row is of
    one pair, and names what it is about.
    """
    row = pa.list_(pa.int32(), sequence_length)
    return pa.schema(
        [
            ("window", pa.int64()),
            ("row", pa.int32()),
            ("tokens", row),
            ("lengths", pa.list_(pa.int32())),
            ("languages", pa.list_(pa.int16())),
            ("documents", pa.list_(pa.int64())),
            *([("targets", row)] if targets else []),
            *([("item", pa.int64())] if items else []),
        ]
    )


@dataclass(frozen=True, order=True)
class Position:
    """Where the stream stands: the next packed row is number `row` of window `window`."""

    window: int = 0
    row: int = 0


@dataclass(frozen=True)
class PackedBatch:
    """Packed rows as arrays. B rows of T tokens holding D documents in all (documents lie row after row)."""

    tokens_BT: np.ndarray
    """int32; padding only after the last document of a row."""
    segments_BT: np.ndarray
    """int32; 1, 2, ... for the documents of a row, 0 for padding."""
    offsets_BT: np.ndarray
    """int32; place of a token in its document, from 0."""
    window_B: np.ndarray
    row_B: np.ndarray
    lengths_D: np.ndarray
    languages_D: np.ndarray
    documents_D: np.ndarray
    batch_D: np.ndarray
    """Row of the batch in which a document lies."""
    targets_BT: np.ndarray | None = None
    """int32; what is to be learnt beside each token, `NO_TARGET` for nothing; None for text alone."""

    item_B: np.ndarray | None = None
    """int64; what a row of one pair is about, 0 for nothing known; None where rows hold no pair of their own."""

    def __len__(self) -> int:
        return len(self.tokens_BT)

    @property
    def next_position(self) -> Position:
        """The position after the last row of this batch."""
        return Position(int(self.window_B[-1]), int(self.row_B[-1]) + 1)
