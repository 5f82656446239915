"""A student learns to give a text and its translation the vector that a teacher gives the half in its language.

Reimers and Gurevych (2020): the squared distance of both to the teacher's vector; or, where the two make vectors of
different size, the squared difference of how alike the texts of a micro-batch are to each other (Tung and Mori 2019).
Shape letters: P pairs, N texts, W width of the wider vector.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlray import languages, storage
from mlray.config import ConfigError, Distillation, RunConfig
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models import embedder, tokenizer
from mlray.models.tokenizer import Encoder
from mlray.objectives import pairing
from mlray.schema import SEPARATOR, PackedBatch

TEACHER = 2
"""Place in a row of the text that the teacher reads, in its own tokens, after the two halves."""


@dataclass(frozen=True)
class Halves:
    """Cuts pairs: both halves for the student, one of them once more for the teacher; each has a third of a row."""

    encoder: Encoder
    teacher: Encoder
    sides: tuple[int, ...]
    """Language number -> the half that the teacher reads."""
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """One piece a pair."""
        halves = [
            (text, pair.split(SEPARATOR)[0]) for text, pair in zip(window.text, window.pair, strict=True)
        ]
        known = [both[self.sides[language]] for both, language in zip(halves, window.language, strict=True)]
        read = iter(self.encoder.encode([half for both in halves for half in both]))
        taught = self.teacher.encode(known)
        pieces = []
        for i, both in enumerate(halves):
            parts = [self._whole(self.encoder, next(read)) for _ in both]
            parts.append(self._whole(self.teacher, taught[i]))
            names = [pairing.name(text) for text in (*both, known[i])]
            texts = tuple((len(part), name) for part, name in zip(parts, names, strict=True))
            tokens = [token for part in parts for token in part]
            pieces.append(Piece(tokens, window.language[i], window.document[i], texts=texts))
        return pieces

    def _whole(self, encoder: Encoder, tokens: list[int]) -> list[int]:
        return [encoder.start_id, *tokens[: self.sequence_length // 3 - 2], encoder.end_id]


def known(teacher: Encoder | None) -> Encoder:
    """What a run of distillation has, and that of another objective has not."""
    assert teacher is not None, "a task of distillation without its teacher's tokenizer"
    return teacher


def halves(
    encoder: Encoder,
    teacher: Encoder | None,
    names: Sequence[str],
    config: Distillation,
    sequence_length: int,
) -> Halves:
    """The cutter for a corpus with these language names.

    Raises:
        ConfigError: neither half of a pair is in the teacher's language.
    """
    for name in names:
        if config.language not in languages.halves(name):
            raise ConfigError(
                f"the pairs {name!r} have no half in distillation.language={config.language}, which the teacher reads"
            )
    sides = tuple(languages.halves(name).index(config.language) for name in names)
    return Halves(encoder, known(teacher), sides, sequence_length)


def collate(batch: PackedBatch, pad_id: int, teacher_pad_id: int) -> dict[str, torch.Tensor]:
    """Inputs of `models.embedder.Distiller`: first halves, then second ones, and the teacher's texts."""
    _, roles_N = pairing.roles(batch)
    own = np.concatenate([np.flatnonzero(roles_N == role) for role in (pairing.QUERY, pairing.TARGET)])
    student = pairing.repack(batch, own, pad_id)
    teacher = pairing.repack(batch, np.flatnonzero(roles_N == TEACHER), teacher_pad_id)
    return {**student, **{f"teacher_{key}": tensor for key, tensor in teacher.items()}}


def loss(vectors_3PW: torch.Tensor, config: Distillation) -> torch.Tensor:
    """Sum over the pairs; both kinds are means over the two halves.

    Args:
        vectors_3PW: of the first halves, the second ones and the teacher, of length 1, filled up with zeros.
        config: which loss.
    """
    return _losses(vectors_3PW, config.loss == "similarity").sum()


def _losses(vectors_3PW: torch.Tensor, similarity: bool) -> torch.Tensor:
    first_PW, second_PW, taught_PW = vectors_3PW.float()
    wanted = taught_PW @ taught_PW.T if similarity else taught_PW
    found = [half @ half.T if similarity else half for half in (first_PW, second_PW)]
    squares = torch.stack([(one - wanted).square() for one in found]).mean(0)
    return squares.mean(-1) if similarity else squares.sum(-1)


def scores(vectors_3PW: torch.Tensor, config: Distillation) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair (P,), and whether its second half is the nearest to the first in the micro-batch."""
    first_PW, second_PW, _ = vectors_3PW
    nearest_P = (first_PW @ second_PW.T).argmax(-1)
    right_P = nearest_P == torch.arange(len(nearest_P), device=nearest_P.device)
    return _losses(vectors_3PW, config.loss == "similarity"), right_P


def open_teacher(config: RunConfig) -> Encoder:
    """The tokenizer of the teacher.

    Raises:
        ConfigError: it is not named, or has none.
    """
    with _teacher(config) as place:
        return tokenizer.encoder(tokenizer.load(place))


def build(config: RunConfig, tokens: Any, folder: Path | str | None) -> embedder.Distiller:
    """The student beside its teacher. See `embedder.build_distiller`."""
    with _teacher(config) as place:
        return embedder.build_distiller(
            config.model, config.contrastive, config.distillation, tokens, folder, place
        )


@contextlib.contextmanager
def _teacher(config: RunConfig) -> Iterator[Path]:
    if config.distillation.teacher is None:
        raise ConfigError("distillation.teacher is empty; name the folder of an encoder")
    with storage.local_copy(config.distillation.teacher, config.storage) as folder:
        yield folder
