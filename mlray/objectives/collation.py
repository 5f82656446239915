"""Micro-batches as the loop sees them: what each objective makes of packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlray.config import Objective, Recommendation
from mlray.models.tokenizer import Encoder, Vocabulary
from mlray.objectives import causal, distillation, labels, masked, multitask, next_item, pairing, translation
from mlray.schema import PackedBatch


@dataclass(frozen=True)
class Inputs:
    """One micro-batch as the loop sees it. N predictions over B rows."""

    model: dict[str, torch.Tensor]
    """Keyword arguments of the model's forward, which returns logits (N, V)."""
    targets_N: torch.Tensor
    rows_N: np.ndarray
    """Row of the batch that a prediction belongs to."""
    characters_N: np.ndarray
    """Characters of text that a target stands for."""
    texts: pairing.Texts | None = None
    """What vectors are of, where the loss looks at those of the whole global batch; N is then pairs."""


def masks(batch: PackedBatch, vocabulary: Vocabulary, config: Objective, seed: int) -> Inputs:
    """Texts with hidden tokens."""
    tokens_BT, masked_N, targets_N = masked.mask(batch, vocabulary, config, seed)
    model = {
        "tokens_BT": torch.from_numpy(tokens_BT),
        "segments_BT": torch.from_numpy(batch.segments_BT),
        "offsets_BT": torch.from_numpy(batch.offsets_BT).long(),
        "masked_N": torch.from_numpy(masked_N),
    }
    return _of_text(batch, model, masked_N, targets_N, vocabulary)


def translations(batch: PackedBatch, vocabulary: Vocabulary) -> Inputs:
    """Pairs for an encoder-decoder."""
    model, targets_N = translation.collate(batch, vocabulary)
    return _of_text(batch, model, model["predicted_N"].numpy(), targets_N, vocabulary)


def continuations(batch: PackedBatch, vocabulary: Vocabulary) -> Inputs:
    """Texts for a decoder."""
    model, targets_N = causal.collate(batch)
    return _of_text(batch, model, model["predicted_N"].numpy(), targets_N, vocabulary)


def sessions(
    batch: PackedBatch, vocabulary: Vocabulary, frequencies_V: np.ndarray | None, config: Recommendation
) -> Inputs:
    """Sessions for a recommender."""
    model, targets_N = next_item.collate(batch, vocabulary, frequencies_V, config.candidates)
    rows_N = model["predicted_N"].numpy() // batch.tokens_BT.shape[1]
    # An item stands for no character.
    return Inputs(model, torch.from_numpy(targets_N), rows_N, np.zeros(len(targets_N), np.int64))


def _of_text(
    batch: PackedBatch,
    model: dict[str, torch.Tensor],
    flat_N: np.ndarray,
    targets_N: np.ndarray,
    vocabulary: Vocabulary,
) -> Inputs:
    """Inputs whose targets are tokens, at the flat positions of the batch."""
    rows_N = flat_N // batch.tokens_BT.shape[1]
    return Inputs(model, torch.from_numpy(targets_N), rows_N, vocabulary.characters_V[targets_N])


def labels_of(batch: PackedBatch) -> Inputs:
    """Texts with labels."""
    model, targets_N = labels.collate(batch)
    rows_N = model["labelled_N"].numpy() // batch.tokens_BT.shape[1]
    # A label stands for no character: bits per character mean nothing here.
    return Inputs(model, torch.from_numpy(targets_N), rows_N, np.zeros(len(targets_N), np.int64))


def texts(batch: PackedBatch, pad_id: int, names: Sequence[str]) -> Inputs:
    """Pairs, in languages with these names, for an encoder of one vector a text."""
    _, sides_L2 = pairing.sides(names)
    model, read = pairing.collate(batch, pad_id, sides_L2)
    pairs = np.arange(len(batch))
    return Inputs(model, torch.from_numpy(pairs), pairs, np.zeros(len(batch), np.int64), read)


def halves(batch: PackedBatch, pad_id: int, teacher: Encoder | None) -> Inputs:
    """Pairs for a student and its teacher."""
    model = distillation.collate(batch, pad_id, distillation.known(teacher).pad_id)
    pairs = np.arange(len(batch))
    return Inputs(model, torch.from_numpy(pairs), pairs, np.zeros(len(batch), np.int64))


def tasks(batch: PackedBatch, names: Sequence[str]) -> Inputs:
    """Texts with labels, by their names, of several tasks."""
    inputs = labels_of(batch)
    inputs.model["allowed_NK"] = multitask.allowed(inputs.targets_N.numpy(), names)
    return inputs
