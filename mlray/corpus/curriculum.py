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


def pack(window: Window, cutter: Cutter, corpus: Corpus, seed: int) -> pa.Table:
    """Packed rows of a window, in stages where the run has a curriculum and the window is one of its first."""
    if corpus.curriculum == "none" or window.number >= corpus.curriculum_windows:
        return packing.pack(window, cutter, corpus.sequence_length, seed)
    pad_id = cutter.encoder.pad_id
    tables = [
        packing.pack_pieces(group, pad_id, corpus.sequence_length, window.number, seed)
        for group in stages(cutter(window), corpus.curriculum)
    ]
    whole = pa.concat_tables(tables)
    rows = pa.array(np.arange(len(whole)), pa.int32())
    return whole.set_column(whole.schema.get_field_index("row"), whole.schema.field("row"), rows)
