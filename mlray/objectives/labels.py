"""Labels of words (NER, slots) and of texts (sentiment, intent, topic), as targets beside packed tokens.

The first piece of a word carries its label (in SentencePiece's vocabularies often the mark of a space, as wherever
`transformers` trains), the first token of a text that of the text; all else is `NO_TARGET`.
Shape letters: B rows, T tokens, N labelled positions, K labels.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlray.config import ConfigError
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models.tokenizer import Encoder
from mlray.objectives import layout
from mlray.schema import NO_TARGET, PackedBatch

_OF_SPAN = re.compile(r"[BIESLU]-.+")
_ALONE = {"O", *"BIESLU"}
"""Outside, and the prefixes without a type: they say nothing of other tags."""


@dataclass(frozen=True)
class Words:
    """Cuts tagged sentences; one that is longer than a row goes on in the next piece, at the end of a word.

    Where the labels are of IOB2 the tags are made so, see `begun`.

    Raises:
        ConfigError: words and tags of different number, or a tag that is no label of the run.
    """

    encoder: Encoder
    labels: dict[str, int]
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """The pieces of each sentence, in order."""
        places = range(len(window.text))
        sentences = [paired(window.text[i], window.pair[i], window.document[i]) for i in places]
        # With the space before it: byte-level tokenizers see another word without, the others the same.
        told = [[f" {word}" if k else word for k, word in enumerate(words)] for words, _ in sentences]
        once = list(dict.fromkeys(word for words in told for word in words))  # most words come many times
        encoded = dict(zip(once, self.encoder.encode(once), strict=True))
        pieces: list[Piece] = []
        same_scheme = scheme(self.labels)
        for i, (_, tags) in enumerate(sentences):
            numbers = [number_of(tag, self.labels, window.document[i]) for tag in same_scheme(tags)]
            parts = [encoded[word] or [self.encoder.pad_id] for word in told[i]]
            for tokens, targets in self._rows(parts, numbers):
                pieces.append(Piece(tokens, window.language[i], window.document[i], targets))
        return pieces

    def _rows(self, parts: list[list[int]], numbers: list[int]) -> list[tuple[list[int], list[int]]]:
        room = self.sequence_length - 2
        rows: list[tuple[list[int], list[int]]] = [([], [])]
        for part, number in zip(parts, numbers, strict=True):
            if len(rows[-1][0]) + len(part[:room]) > room:
                rows.append(([], []))
            rows[-1][0].extend(part[:room])
            rows[-1][1].extend([number, *[NO_TARGET] * (len(part[:room]) - 1)])
        start, end = self.encoder.start_id, self.encoder.end_id
        return [([start, *tokens, end], [NO_TARGET, *targets, NO_TARGET]) for tokens, targets in rows]


@dataclass(frozen=True)
class Texts:
    """Cuts labelled texts; what is longer than a row is cut off.

    Raises:
        ConfigError: a label that is none of the run.
    """

    encoder: Encoder
    labels: dict[str, int]
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """One piece a text."""
        start, end, room = self.encoder.start_id, self.encoder.end_id, self.sequence_length - 2
        pieces = []
        for i, ids in enumerate(self.encoder.encode(window.text)):
            tokens = [start, *ids[:room], end]
            number = number_of(window.pair[i], self.labels, window.document[i])
            targets = [number, *[NO_TARGET] * (len(tokens) - 1)]
            pieces.append(Piece(tokens, window.language[i], window.document[i], targets))
        return pieces


def paired(text: str, tags: str, document: int) -> tuple[list[str], list[str]]:
    """The words of a sentence and their tags.

    Raises:
        ConfigError: they are of different number.
    """
    both = text.split(" "), tags.split(" ")
    if len(both[0]) != len(both[1]):
        raise ConfigError(f"document {document} has {len(both[0])} words and {len(both[1])} tags")
    return both


def mark_spans(places: Mapping[str, str]) -> bool:
    """Whether tags mark spans (`O`, and B-, I-, E- or L-, S- or U- before a type), or each its word, as NOUN does.

    Args:
        places: tag -> file and row where it stands, for an error's beginning.

    Raises:
        ConfigError: a tag is a number, or some mark spans and others words.
    """
    words = [tag for tag in places if tag not in _ALONE and not _OF_SPAN.fullmatch(tag)]
    if number := next((tag for tag in words if tag.isdecimal()), None):
        raise ConfigError(
            f"{places[number]} has the tag {number!r}, and a number does not say whether it marks a span; take a "
            "column of names such as B-LOC and O, or name each number by label_map=uri:number:name of the source"
        )
    spans = [tag for tag in places if _OF_SPAN.fullmatch(tag)]
    if words and spans:
        raise ConfigError(
            f"{places[words[0]]} has the tag {words[0]!r}, which marks no span, and {places[spans[0]]} has "
            f"{spans[0]!r}, which does; give one task tags of one kind, with label_map of the source if need be"
        )
    return not words


def begun(tags: Sequence[str]) -> list[str]:
    """Tags whose spans begin with their B- tag (IOB2): an `I-X` that begins one becomes `B-X`.

    CoNLL-2003 writes B- between two neighbours of one type alone (IOB1), and noisy data leave it out. The spans are
    those that seqeval finds in either.
    """
    return [
        f"B-{tag[2:]}" if tag.startswith("I-") and before not in {tag, f"B-{tag[2:]}"} else tag
        for before, tag in itertools.pairwise(["O", *tags])
    ]


def scheme(names: Collection[str]) -> Callable[[Sequence[str]], list[str]]:
    """How tags are read by a model of these labels: `begun`, where theirs are of IOB2, or as they are."""
    return begun if _is_iob2(names) else list


def _is_iob2(names: Collection[str]) -> bool:
    """Whether there is a `B-X` for each `I-X`: so it is once training has read `begun` tags.

    A checkpoint that others trained on IOB1 may lack one.
    """
    return all(f"B-{name[2:]}" in names for name in names if name.startswith("I-"))


def number_of(label: str, labels: dict[str, int], document: int) -> int:
    """The number of a label.

    Raises:
        ConfigError: training did not know it.
    """
    if label not in labels:
        raise ConfigError(
            f"document {document}: the label {label!r} is none of the {len(labels)} of the training"
        )
    return labels[label]


def tags(logits_NK: np.ndarray, names: Sequence[str]) -> list[int]:
    """The likeliest tags of the N words of a sentence, of all sequences in which spans begin with their B- tag.

    Word by word the likeliest tag may be `I-X` after `O`, which counts as a span, and as a wrong one. Where an `I-X`
    has no `B-X` (IOB1, or no spans) every sequence is allowed. Viterbi's algorithm; logits will do, as what they lack
    to log-probabilities is the same for all tags of a word.
    """
    forbidden_K, forbidden_KK = _forbidden(tuple(names))
    best_K = np.where(forbidden_K, -np.inf, logits_NK[0])
    came_from = []
    for word_K in logits_NK[1:]:
        through_KK = np.where(forbidden_KK, -np.inf, best_K[:, None])
        came_from.append(through_KK.argmax(axis=0))
        best_K = through_KK.max(axis=0) + word_K
    path = [int(best_K.argmax())]
    for before_K in reversed(came_from):
        path.append(int(before_K[path[-1]]))
    return path[::-1]


@functools.lru_cache(maxsize=16)
def _forbidden(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which tags cannot begin a sentence, and which cannot follow which: `I-X` follows `B-X` or `I-X` alone."""
    inside_K = np.array([name.startswith("I-") and _is_iob2(names) for name in names])
    goes_on_KK = np.array([[before in {name, f"B-{name[2:]}"} for name in names] for before in names])
    return inside_K, inside_K & ~goes_on_KK


def numbered(labels: Sequence[str]) -> dict[str, int]:
    """Label -> its place."""
    return {label: number for number, label in enumerate(labels)}


def collate(batch: PackedBatch) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Inputs of `models.labeller.Labeller` and the targets (N,) int64."""
    model, labelled_N, targets_N = layout.targets(batch)
    model["labelled_N"] = torch.from_numpy(labelled_N)
    return model, targets_N
