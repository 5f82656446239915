"""Translation of pairs: one model for all directions, told the target language by the decoder's first token.

As M2M-100 (Fan et al. 2021) and mBART-50 do it: the encoder reads `<source language> text </s>`, the decoder
`</s> <target language> translation` and predicts the translation and `</s>`. Shape letters: B rows, T tokens,
N predicted positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlray import languages
from mlray.config import ConfigError, Objective
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.models.tokenizer import Encoder, Vocabulary
from mlray.objectives import layout
from mlray.schema import NO_TARGET, PackedBatch


def directions(names: Sequence[str]) -> list[tuple[str, str]]:
    """`en-de` -> (en, de).

    Raises:
        ConfigError: a language is no direction.
    """
    for name in names:
        if not languages.is_direction(name):
            raise ConfigError(
                f"objective.name=translation needs pairs in a language such as en-de, and a source is in {name!r}; "
                "set its sources[].language"
            )
    return [languages.halves(name) for name in names]


@dataclass(frozen=True)
class Pairs:
    """Cuts pairs into pieces whose source and target share their columns; what is longer than a row is cut off."""

    encoder: Encoder
    languages: tuple[tuple[int, int], ...]
    """Language number -> tokens of the source and the target language."""
    sequence_length: int

    def __call__(self, window: Window) -> list[Piece]:
        """One piece a pair."""
        sources, targets = self.encoder.encode(window.text), self.encoder.encode(window.pair)
        room, end = self.sequence_length - 2, self.encoder.end_id
        pieces = []
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            of, into = self.languages[window.language[i]]
            left, right = [of, *source[:room], end], [into, *target[:room], end]
            if len(target) > room:
                right[-1] = NO_TARGET  # the text does not end where it is cut
            pieces.append(layout.two_halves(window, i, left, right, self.encoder.pad_id))
        return pieces


def pairs(encoder: Encoder, names: Sequence[str], sequence_length: int) -> Pairs:
    """The cutter for a corpus with these language names.

    Raises:
        ConfigError: a language is no direction, or the tokenizer has no token for one.
    """
    told = sorted({language for both in directions(names) for language in both})
    remedy = "translate between those, or train a tokenizer"
    ids = dict(zip(told, layout.language_ids(encoder, told, remedy), strict=True))
    return Pairs(encoder, tuple((ids[of], ids[into]) for of, into in directions(names)), sequence_length)


def collate(batch: PackedBatch, vocabulary: Vocabulary) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Inputs of `models.translator.Translator` and the targets (N,) int64."""
    targets_BT = batch.targets_BT
    assert targets_BT is not None, "rows without targets reached the translation objective"
    starts_BT = (batch.offsets_BT == 0) & (batch.segments_BT > 0)
    before_BT = np.roll(targets_BT, 1, axis=1)
    decoder_BT = np.where(starts_BT, vocabulary.end_id, before_BT)
    decoder_BT = np.where((decoder_BT == NO_TARGET) | (batch.segments_BT == 0), vocabulary.pad_id, decoder_BT)
    # The language is told, not guessed.
    predicted_N = np.flatnonzero((targets_BT != NO_TARGET) & ~starts_BT)
    model = {
        "source_BT": torch.from_numpy(batch.tokens_BT.astype(np.int64)),
        "target_BT": torch.from_numpy(decoder_BT.astype(np.int64)),
        "segments_BT": torch.from_numpy(batch.segments_BT),
        "offsets_BT": torch.from_numpy(batch.offsets_BT).long(),
        "predicted_N": torch.from_numpy(predicted_N),
    }
    return model, targets_BT.ravel()[predicted_N].astype(np.int64)


def loss(logits_NV: torch.Tensor, targets_N: torch.Tensor, config: Objective) -> torch.Tensor:
    """Sum of the label-smoothed negative log-likelihoods (nats), in fp32."""
    return torch.nn.functional.cross_entropy(
        logits_NV.float(), targets_N, reduction="sum", label_smoothing=config.label_smoothing
    )
