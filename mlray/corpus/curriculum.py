"""The order of documents inside windows: from short to long or language after language in the first, or in batches of
one language or source in all.

A window is cut into stages that are packed one after the other, so the order stays a pure function of the window, and a
position in the stream means what it means without a curriculum (Bengio et al. 2009; Platanios et al. 2019 for length).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mlray.config import Corpus
from mlray.corpus import packing
from mlray.corpus.packing import Cutter, Piece
from mlray.corpus.windows import Window

_STAGES = 8
"""Of a window that goes from short to long."""


def stages(pieces: Sequence[Piece], kind: str) -> list[list[Piece]]:
    """The pieces of a window in groups, the first to be learnt first; none is empty.

    Args:
        pieces: in the window's own shuffled order, which holds inside a group.
        kind: `length` (groups of like number of pieces) or `language` (the one with the most pieces first).
    """
    if kind == "length":
        ordered = sorted(pieces, key=lambda piece: len(piece.tokens))
        cuts = np.linspace(0, len(ordered), _STAGES + 1).astype(int)
        groups = [ordered[first:last] for first, last in itertools.pairwise(cuts)]
    else:
        counts = Counter(piece.language for piece in pieces)
        order = sorted(counts, key=lambda language: (-counts[language], language))
        groups = [[piece for piece in pieces if piece.language == language] for language in order]
    return [group for group in groups if group]


def pack(window: Window, cutter: Cutter, corpus: Corpus, seed: int, batch_rows: int = 0) -> pa.Table:
    """Packed rows of a window, in stages where the run has a curriculum and the window is one of its first.

    With `corpus.batches` each global batch, `batch_rows` rows of a pair each, is of one language or of one source.
    """
    if corpus.batches != "mixed":
        return _batches(window, cutter, corpus, seed, batch_rows)
    if corpus.curriculum == "none" or window.number >= corpus.curriculum_windows:
        return packing.pack(window, cutter, corpus.sequence_length, seed)
    pad_id = cutter.encoder.pad_id
    tables = [
        packing.pack_pieces(group, pad_id, corpus.sequence_length, window.number, seed)
        for group in stages(cutter(window), corpus.curriculum)
    ]
    return _numbered(pa.concat_tables(tables))


def _batches(window: Window, cutter: Cutter, corpus: Corpus, seed: int, batch_rows: int) -> pa.Table:
    """The rows of a window in batches of one group, in a seeded order; what fills none comes last, mixed."""
    own = window.language if corpus.batches == "language" else window.source
    group_of = dict(zip(window.document, own, strict=True))
    pieces: dict[int, list[Piece]] = {}
    for piece in cutter(window):
        pieces.setdefault(group_of[piece.document], []).append(piece)
    pad_id, length = cutter.encoder.pad_id, corpus.sequence_length
    whole, rest = [], []
    for group in sorted(pieces):
        table = packing.pack_pieces(pieces[group], pad_id, length, window.number, seed)
        filled = len(table) // batch_rows * batch_rows
        whole += [table.slice(start, batch_rows) for start in range(0, filled, batch_rows)]
        rest.append(table.slice(filled))
    draw = np.random.default_rng([seed, 5, window.number])
    last = pa.concat_tables(rest)
    ordered = [whole[i] for i in draw.permutation(len(whole))]
    return _numbered(pa.concat_tables([*ordered, last.take(draw.permutation(len(last)))]))


def _numbered(table: pa.Table) -> pa.Table:
    """Rows that are called by their place."""
    rows = pa.array(np.arange(len(table)), pa.int32())
    return table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
