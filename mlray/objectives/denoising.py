"""Denoising: a sequence-to-sequence model reads a damaged text and writes the whole one (mBART, Liu et al. 2020).

The noise is that of BART (Lewis et al. 2020, section 2.2): the sentences of a text in another order, then spans of
tokens (Poisson lengths), each replaced by one mask token. A piece is laid out like one of `translation.Pairs`, so
all that follows is that of translation. Shape letter: V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlray.config import Objective
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models.tokenizer import Encoder, Vocabulary
from mlray.objectives import layout

_MARKS = (".", "!", "?", "。", "！", "？", "।", "؟")
_WORD_MARKS = "▁Ġ"
"""How SentencePiece and byte-level tokenizers spell the space before a word."""


@dataclass(frozen=True)
class Noised:
    """Cuts texts into pieces of a damaged and a whole half; a text that is longer than a row goes on in the next piece.

    The noise is a function of (seed, window, place in the window): a run that resumes repeats it, and the next epoch,
    whose windows have other numbers, draws anew.
    """

    encoder: Encoder
    languages: tuple[int, ...]
    """Language number -> its token."""
    sequence_length: int
    vocabulary: Vocabulary
    ends_sentence_V: np.ndarray
    """bool; the token ends with a full stop or its like."""
    config: Objective
    seed: int

    def __call__(self, window: Window) -> list[Piece]:
        """The pieces of each text, in order."""
        room, end = self.sequence_length - 2, self.encoder.end_id
        pieces = []
        for i, tokens in enumerate(self.encoder.encode(window.text)):
            draw = np.random.default_rng([self.seed, 5, window.number, i])
            first = self.languages[window.language[i]]
            parts = max(-(-len(tokens) // room), 1)
            for part in range(parts):
                whole = tokens[len(tokens) * part // parts : len(tokens) * (part + 1) // parts]
                left = [first, *self.damage(whole, draw), end]
                right = [first, *whole, end]
                pieces.append(layout.two_halves(window, i, left, right, self.encoder.pad_id))
        return pieces

    def damage(self, tokens: list[int], draw: np.random.Generator) -> list[int]:
        """The tokens with noise; never more of them than a row has room for."""
        if self.config.permute_sentences:
            sentences = self.sentences(tokens)
            tokens = [token for place in draw.permutation(len(sentences)) for token in sentences[place]]
        # Rounded at random, so that short texts lose the same share as long ones.
        hidden = int(len(tokens) * self.config.noise_rate + draw.random())
        spans = _spans(hidden, self.config.span_length, draw)
        spare = self.sequence_length - 2 - (len(tokens) - hidden) - np.count_nonzero(spans)
        spans = spans[(spans > 0) | (np.cumsum(spans == 0) <= spare)]
        # Spans and the tokens that stay are shuffled like cards, each of the two in its own order.
        places = np.sort(draw.choice(len(tokens) - hidden + len(spans), size=len(spans), replace=False))
        damaged: list[int] = []
        read = written = 0
        for place, span in zip(places, spans, strict=True):
            damaged += [*tokens[read : read + place - written], self.vocabulary.mask_id]
            read += place - written + span
            written = place + 1
        return damaged + tokens[read:]

    def sentences(self, tokens: list[int]) -> list[list[int]]:
        """The tokens of each sentence: it ends after a full stop (question mark, ...) before the next word's start."""
        ids = np.array(tokens, dtype=np.int64)
        cuts = np.flatnonzero(self.ends_sentence_V[ids[:-1]] & self.vocabulary.starts_word_V[ids[1:]]) + 1
        return [part.tolist() for part in np.split(ids, cuts)]


def _spans(hidden: int, mean: float, draw: np.random.Generator) -> np.ndarray:
    """Poisson lengths in random order whose sum is `hidden`; the last that was drawn is cut to fit."""
    spans = draw.poisson(mean, hidden)
    while spans.sum() < hidden:
        spans = np.concatenate([spans, draw.poisson(mean, hidden)])
    sums = np.cumsum(spans)
    last = int(np.searchsorted(sums, hidden))
    spans = spans[: last + 1] if hidden else spans[:0]
    spans[-1:] -= sums[last : last + 1] - hidden
    return draw.permutation(spans)


def noised(
    encoder: Encoder,
    vocabulary: Vocabulary,
    names: Sequence[str],
    sequence_length: int,
    config: Objective,
    seed: int,
) -> Noised:
    """The cutter for a corpus with these language names.

    Raises:
        ConfigError: the tokenizer has no token for one of them.
    """
    languages = tuple(layout.language_ids(encoder, names, "denoise those, or train a tokenizer"))
    ends = _ends_sentence(encoder, vocabulary)
    return Noised(encoder, languages, sequence_length, vocabulary, ends, config, seed)


def _ends_sentence(encoder: Encoder, vocabulary: Vocabulary) -> np.ndarray:
    """Which tokens end with a mark that ends sentences, in the tokenizer's own spelling of it (V,) bool."""
    model = json.loads(encoder.definition)["model"]["vocab"]
    pieces = dict(
        model.items() if isinstance(model, dict) else ((entry[0], i) for i, entry in enumerate(model))
    )
    names = {number: piece for piece, number in pieces.items()}
    ends_V = np.zeros(vocabulary.size, dtype=bool)
    for ids in encoder.encode(_MARKS):
        if not vocabulary.special_V[ids].any():  # else the mark is an unknown character
            mark = "".join(names[i] for i in ids).lstrip(_WORD_MARKS)
            ends_V[[number for piece, number in pieces.items() if piece.endswith(mark)]] = True
    return ends_V
