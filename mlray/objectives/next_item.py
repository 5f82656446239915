"""The next item of a session: market, query and the items so far are read; every item is predicted from what is before.

Shape letters: B rows, T tokens, N predicted positions, M candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from mlray.corpus import sessions as texts
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models.tokenizer import Encoder, Vocabulary
from mlray.objectives import causal, layout
from mlray.schema import NO_TARGET, PackedBatch


@dataclass(frozen=True)
class Sessions:
    """Cuts sessions into pieces `<market> query item item ...`; what the tokenizer does not know is left out."""

    encoder: Encoder
    markets: tuple[int, ...]
    """Language number -> token of the market."""
    unknown: frozenset[int]
    """Tokens that stand for no item and no word."""
    queries: frozenset[int]
    """Tokens of words of a query, which are read, and not predicted."""
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """The pieces of each session; one that is longer than a row begins anew in the next."""
        return [
            Piece([*told, *part], window.language[i], window.document[i], [*[NO_TARGET] * len(told), *part])
            for i, (asked, ids) in enumerate(self.ids(window.text))
            for told in [[self.markets[window.language[i]], *asked]]
            for part in self._parts(ids, self.sequence_length - len(told))
        ]

    def _parts(self, ids: list[int], room: int) -> list[list[int]]:
        return [ids[first : first + room] for first in range(0, len(ids), room)] or [[]]

    def ids(self, sessions: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """The known words of the query of each session, which take half of a row at most, and its known items."""
        encoded = self.encoder.encode([" ".join(texts.tokens(text)) for text in sessions])
        room = (self.sequence_length - 1) // 2
        return [
            (
                [one for one in ids if one in self.queries][:room],
                [one for one in ids if one not in self.unknown and one not in self.queries],
            )
            for ids in encoded
        ]


def markets(encoder: Encoder, names: Sequence[str]) -> tuple[int, ...]:
    """The token of each market.

    Raises:
        ConfigError: the tokenizer has none for one.
    """
    remedy = "objective.name=next_item makes one with tokenizer.algorithm=items"
    return tuple(layout.language_ids(encoder, names, remedy, "market"))


def sessions(
    encoder: Encoder, vocabulary: Vocabulary, names: Sequence[str], sequence_length: int
) -> Sessions:
    """The cutter for a corpus of these markets.

    Raises:
        ConfigError: as `markets`.
    """
    unknown, queries = (
        frozenset(np.flatnonzero(one_V).tolist())
        for one_V in (vocabulary.special_V & ~vocabulary.queries_V, vocabulary.queries_V)
    )
    return Sessions(encoder, markets(encoder, names), unknown, queries, sequence_length)


def collate(
    batch: PackedBatch,
    vocabulary: Vocabulary,
    frequencies_V: np.ndarray | None,
    kind: Literal["batch", "all"],
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Inputs of `models.recommender.Recommender`, and of each right item its place among the candidates (N,) int64.

    Args:
        batch: packed sessions.
        vocabulary: of the items.
        frequencies_V: how often the run draws each token as the right item, of 1; of `all` nobody asks.
        kind: of `recommendation.candidates`.
    """
    model, tokens_N = causal.collate(batch)
    candidates_M = np.unique(tokens_N) if kind == "batch" else np.flatnonzero(~vocabulary.special_V)
    drawn_M = np.zeros(len(candidates_M))
    if kind == "batch":
        assert frequencies_V is not None, "items whose frequencies nobody counted"
        drawn_M = _log_drawn(frequencies_V, candidates_M, len(tokens_N))
    model["candidates_M"] = torch.from_numpy(candidates_M)
    model["drawn_M"] = torch.from_numpy(drawn_M.astype(np.float32))
    return model, np.searchsorted(candidates_M, tokens_N)


def _log_drawn(frequencies_V: np.ndarray, candidates_M: np.ndarray, number: int) -> np.ndarray:
    """Logarithm of how likely each candidate (M,) is among the distinct ones of so many draws.

    For rare items that is log Q and a constant (Yi et al. 2019); what is surely drawn needs no correction.
    """
    least = frequencies_V[frequencies_V > 0].min(initial=1.0)  # of what validation alone has
    often_M = np.clip(frequencies_V[candidates_M], least, 1.0 - 1e-12)
    found: np.ndarray = np.log(-np.expm1(number * np.log1p(-often_M)))
    return found
