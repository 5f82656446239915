"""Pairs and their texts: cut into rows of the stream, and packed anew for an encoder of one vector a text.

Shape letters: B rows, T tokens, N texts, P pairs, L languages of the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlray import languages
from mlray.config import ConfigError
from mlray.corpus import packing
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models.tokenizer import Encoder
from mlray.schema import SEPARATOR, PackedBatch

QUERY, TARGET = 0, 1
"""Places of the two halves in a row; from 2 on there are hard negatives."""


@dataclass(frozen=True)
class Pairs:
    """Cuts pairs: both halves and the hard negatives as texts of one row.

    No text has more than half of the row, which the model has positions for. With hard negatives the longest texts are
    cut to one length, the greatest with which all fit.
    """

    encoder: Encoder
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """One piece a pair.

        Raises:
            ConfigError: a row has nothing beside its text, or more hard negatives than fit.
        """
        told = [[text, *pair.split(SEPARATOR)] for text, pair in zip(window.text, window.pair, strict=True)]
        encoded = iter(self.encoder.encode([text for texts in told for text in texts]))
        start, end = self.encoder.start_id, self.encoder.end_id
        pieces = []
        for i, texts in enumerate(told):
            bodies = [next(encoded) for _ in texts]
            room = _room([len(body) for body in bodies], self.sequence_length)
            if room < 1 or not texts[1]:
                raise ConfigError(
                    f"document {window.document[i]} has {len(texts) - 2} hard negatives, too many for a row of "
                    f"{self.sequence_length} tokens; raise corpus.sequence_length"
                    if texts[1]
                    else f"document {window.document[i]} has nothing beside its text"
                )
            parts = [[start, *body[:room], end] for body in bodies]
            named = tuple((len(part), name(text)) for part, text in zip(parts, texts, strict=True))
            tokens = [token for part in parts for token in part]
            item = window.item[i] if window.item else 0
            pieces.append(Piece(tokens, window.language[i], window.document[i], texts=named, item=item))
        return pieces


def _room(lengths: Sequence[int], sequence_length: int) -> int:
    """Tokens of a text, beside its two special ones, with which texts of these lengths fit into a row."""
    left, count = sequence_length - 2 * len(lengths), len(lengths)
    most = sequence_length // 2 - 2
    for length in sorted(lengths):
        if length * count > left:
            return min(left // count, most)
        left, count = left - length, count - 1
    return most


def name(text: str) -> int:
    """A number (63 bits) by which a text is known to be another's copy."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Texts:
    """What the loss knows of N texts beside their vectors."""

    names_N: np.ndarray
    """int64; copies share one."""
    pairs_N: np.ndarray
    """int64; the pair that a text belongs to, from 0."""
    roles_N: np.ndarray
    """int64; `QUERY`, `TARGET`, and from 2 on the hard negatives."""
    languages_N: np.ndarray
    """int64; number of the text's own language."""
    items_N: np.ndarray
    """int64; what the text's pair is about, 0 if that is not known."""

    def stack(self) -> np.ndarray:
        """All as one array (5, N), to be sent."""
        return np.stack([self.names_N, self.pairs_N, self.roles_N, self.languages_N, self.items_N])

    @classmethod
    def join(cls, parts: Sequence[np.ndarray]) -> Texts:
        """Of several workers' or micro-batches' arrays, with pairs numbered on."""
        first = np.cumsum([0, *(part[1].max(initial=-1) + 1 for part in parts)])
        moved = [part + np.array([[0], [first[i]], [0], [0], [0]]) for i, part in enumerate(parts)]
        return cls(*np.concatenate(moved, axis=1))


def known(texts: Texts | None) -> Texts:
    """What a micro-batch of pairs has, and that of another objective has not."""
    assert texts is not None, "a micro-batch without pairs reached the contrastive objective"
    return texts


def sides(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The languages of both halves of the pairs: their names, and for each language number of the corpus two numbers.

    A tag that is no direction, such as `de`, is that of both halves.
    """
    both = [languages.halves(one) for one in names]
    order = sorted({language for pair in both for language in pair})
    return order, np.array([[order.index(language) for language in pair] for pair in both])


def collate(batch: PackedBatch, pad_id: int, sides_L2: np.ndarray) -> tuple[dict[str, torch.Tensor], Texts]:
    """Inputs of `models.embedder.Embedder`, the texts packed anew into rows without regard to pairs, and what they are.

    Args:
        batch: a pair a row.
        pad_id: token that fills a row.
        sides_L2: of `sides`.
    """
    pairs_N, roles_N = roles(batch)
    half_N = np.minimum(roles_N, TARGET)  # a hard negative is one of the target's side
    item_B = np.zeros(len(batch), np.int64) if batch.item_B is None else batch.item_B
    texts = Texts(batch.documents_D, pairs_N, roles_N, sides_L2[batch.languages_D, half_N], item_B[pairs_N])
    return repack(batch, np.arange(len(pairs_N)), pad_id), texts


def roles(batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """The pair of each text of a batch (N,), from 0, and its place in the pair."""
    pairs_N = batch.batch_D.astype(np.int64)
    return pairs_N, np.arange(len(pairs_N)) - np.searchsorted(pairs_N, pairs_N)


def repack(batch: PackedBatch, chosen_N: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """Texts of a batch in rows of its length, see `rows`."""
    ends_D = np.cumsum(batch.lengths_D.astype(np.int64))
    tokens = batch.tokens_BT[batch.segments_BT > 0]
    ends_N, lengths_N = ends_D[chosen_N], batch.lengths_D.astype(np.int64)[chosen_N]
    texts = [tokens[end - length : end] for end, length in zip(ends_N, lengths_N, strict=True)]
    return rows(texts, batch.tokens_BT.shape[1], pad_id)


def rows(texts: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """N texts in as few rows as they fit into, as `models.embedder.Embedder` takes them.

    Args:
        texts: tokens of each.
        length: of a row; no text is longer.
        pad_id: token that fills a row.
    """
    lengths_N = np.array([len(text) for text in texts], dtype=np.int64)
    packed = packing.best_fit(lengths_N.tolist(), length)
    tokens_BT = np.full((len(packed), length), pad_id, dtype=np.int64)
    texts_BT = np.full((len(packed), length), len(texts), dtype=np.int64)
    segments_BT, offsets_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
    first_N = np.zeros(len(texts), dtype=np.int64)
    for row, inside in enumerate(packed):
        column = 0
        for segment, text in enumerate(inside, 1):
            place = slice(column, column + lengths_N[text])
            tokens_BT[row, place] = texts[text]
            texts_BT[row, place], segments_BT[row, place] = text, segment
            offsets_BT[row, place] = np.arange(lengths_N[text])
            first_N[text] = row * length + column
            column += lengths_N[text]
    arrays: dict[str, np.ndarray] = {
        "tokens_BT": tokens_BT,
        "segments_BT": segments_BT,
        "offsets_BT": offsets_BT,
        "texts_BT": texts_BT,
        "first_N": first_N,
        "last_N": first_N + lengths_N - 1,
    }
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
