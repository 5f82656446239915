"""The order of documents inside the first windows of a run: from short to long, or language after language.

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

    With `corpus.same_language` each global batch, `batch_rows` rows of a pair each, is of one language.
    """
    if corpus.same_language:
        return by_language(packing.pack(window, cutter, corpus.sequence_length, seed), batch_rows, seed)
    if corpus.curriculum == "none" or window.number >= corpus.curriculum_windows:
        return packing.pack(window, cutter, corpus.sequence_length, seed)
    pad_id = cutter.encoder.pad_id
    tables = [
        packing.pack_pieces(group, pad_id, corpus.sequence_length, window.number, seed)
        for group in stages(cutter(window), corpus.curriculum)
    ]
    return _numbered(pa.concat_tables(tables))


def by_language(table: pa.Table, batch_rows: int, seed: int) -> pa.Table:
    """The rows of a window in batches of one language, in a seeded order; what fills none comes last, mixed."""
    languages = np.array([own[0] for own in table.column("languages").to_pylist()])
    batches, rest = [], []
    for language in np.unique(languages):
        rows = np.flatnonzero(languages == language)
        whole = len(rows) // batch_rows * batch_rows
        batches += np.split(rows[:whole], whole // batch_rows) if whole else []
        rest.append(rows[whole:])
    order = np.random.default_rng([seed, 5, table.column("window")[0].as_py()]).permutation(len(batches))
    return _numbered(
        table.take(np.concatenate([*(batches[i] for i in order), np.sort(np.concatenate(rest))]))
    )


def _numbered(table: pa.Table) -> pa.Table:
    """Rows that are called by their place."""
    rows = pa.array(np.arange(len(table)), pa.int32())
    return table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
