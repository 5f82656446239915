"""Causal language modelling: each token from those before it, in texts or in what belongs to a text.

A text alone is `<start> text <end>` and all of it is learnt (Radford et al. 2019); with a pair, an answer or a
translation, it is `<start> text <end> pair <end>` and only the pair and its end are. Shape letters: B rows, T tokens,
N predicted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from mlray.config import Source
from mlray.corpus.packing import Piece, TextEncoder, pieces
from mlray.corpus.windows import Window
from mlray.objectives import layout
from mlray.schema import NO_TARGET, PackedBatch

_Parts = dict[int, list[tuple[list[int], list[int]]]]
"""Place in a window -> tokens and targets of the pieces of its document."""


@dataclass(frozen=True)
class Continuations:
    """Cuts texts into pieces, and pairs into one each; beside a token stands itself where it is to be predicted."""

    encoder: TextEncoder
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """The pieces of each document, in order."""
        places = range(len(window.text))
        found = self._texts(window, [i for i in places if not window.pair[i]])
        found |= self._pairs(window, [i for i in places if window.pair[i]])
        return [
            Piece(tokens, window.language[i], window.document[i], targets)
            for i in places
            for tokens, targets in found[i]
        ]

    def _texts(self, window: Window, places: list[int]) -> _Parts:
        found: _Parts = {i: [] for i in places}
        nothing = [""] * len(places)
        alone = Window(window.number, [window.text[i] for i in places], nothing, [0] * len(places), places)
        for piece in pieces(alone, self.encoder, self.sequence_length):
            found[piece.document].append((piece.tokens, [NO_TARGET, *piece.tokens[1:]]))
        for parts in found.values():
            for _, targets in parts[:-1]:
                targets[-1] = NO_TARGET  # a text that goes on in the next piece does not end here
        return found

    def _pairs(self, window: Window, places: list[int]) -> _Parts:
        """What is longer than a row is cut off, from the text first."""
        texts = self.encoder.encode([window.text[i] for i in places])
        pairs = self.encoder.encode([window.pair[i] for i in places])
        room, end = self.sequence_length - 3, self.encoder.end_id
        found: _Parts = {}
        for i, text, pair in zip(places, texts, pairs, strict=True):
            kept = pair[:room]
            told = [self.encoder.start_id, *text[: room - len(kept)], end]
            last = end if len(kept) == len(pair) else NO_TARGET
            found[i] = [([*told, *kept, end], [*[NO_TARGET] * len(told), *kept, last])]
        return found


def paired(sources: Iterable[Source]) -> bool:
    """Whether any of the sources has something beside its texts."""
    return any(one.pair or one.pair_uri or one.last_is_pair or one.format == "squad" for one in sources)


def collate(batch: PackedBatch) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Inputs of `models.decoder.Decoder` and the targets (N,) int64: what stands one column on."""
    model, learnt_N, targets_N = layout.targets(batch)
    model["predicted_N"] = torch.from_numpy(learnt_N - 1)  # never a document's first token, so never a row's
    return model, targets_N
