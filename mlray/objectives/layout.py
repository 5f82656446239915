"""What several objectives do alike: tokens of languages, pieces of two halves, and the targets beside packed tokens.

Shape letters: B rows, T tokens, N targets.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from mlray.config import ConfigError
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models.tokenizer import Encoder
from mlray.schema import NO_TARGET, PackedBatch


def language_ids(encoder: Encoder, names: Iterable[str], remedy: str, kind: str = "language") -> list[int]:
    """The token of each language.

    Args:
        encoder: the tokenizer.
        names: of the languages.
        remedy: what the error tells to do.
        kind: what the error calls them.

    Raises:
        ConfigError: the tokenizer has none for one of them.
    """
    known, found = encoder.language_ids, []
    for name in names:
        if name not in known:
            raise ConfigError(
                f"the tokenizer has no token for the {kind} {name!r}, only for {', '.join(sorted(known)) or 'none'}; "
                f"{remedy}"
            )
        found.append(known[name])
    return found


def two_halves(window: Window, place: int, left: list[int], right: list[int], pad_id: int) -> Piece:
    """A piece of which an encoder reads `left` and a decoder writes `right`, in the same columns."""
    columns = max(len(left), len(right))
    left = left + [pad_id] * (columns - len(left))
    right = right + [NO_TARGET] * (columns - len(right))
    return Piece(left, window.language[place], window.document[place], right)


def targets(batch: PackedBatch) -> tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]:
    """Packed rows as a model reads them, the flat places of their targets (N,), and the targets (N,) int64."""
    targets_BT = batch.targets_BT
    assert targets_BT is not None, "rows without targets reached an objective that learns them"
    places_N = np.flatnonzero(targets_BT != NO_TARGET)
    model = {
        "tokens_BT": torch.from_numpy(batch.tokens_BT.astype(np.int64)),
        "segments_BT": torch.from_numpy(batch.segments_BT),
        "offsets_BT": torch.from_numpy(batch.offsets_BT).long(),
    }
    return model, places_N, targets_BT.ravel()[places_N].astype(np.int64)
