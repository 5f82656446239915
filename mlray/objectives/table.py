"""The table of objectives: how documents are cut, which model learns from them, its inputs and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlray.config import Model as ModelConfig
from mlray.config import Objective as ObjectiveConfig
from mlray.corpus.packing import Cutter, Texts
from mlray.models import backbone, labeller, translator
from mlray.models.tokenizer import Encoder, Vocabulary
from mlray.objectives import labels, masked, translation
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


@dataclass(frozen=True)
class Objective:
    """A row of the table."""

    cutter: Callable[[Encoder, list[str], int, list[str]], Cutter]
    """(tokenizer, names of the language numbers, sequence length, labels) -> what cuts documents into pieces."""
    build: Callable[[ModelConfig, Any, Path | str | None, list[str]], Any]
    """(model configuration, tokenizer, folder or None, labels) -> model."""
    collate: Callable[[PackedBatch, Vocabulary, ObjectiveConfig, int], Inputs]
    """(batch, vocabulary, configuration, seed) -> inputs."""
    loss: Callable[[torch.Tensor, torch.Tensor, ObjectiveConfig], torch.Tensor]
    """(logits_NV, targets_N, configuration) -> sum over N, in nats."""
    special_tokens: tuple[str, ...]
    """What the tokenizer must have."""
    language_tokens: Callable[[list[str]], list[str]] = lambda _: []
    """Names of the language numbers -> languages that need a token of their own."""
    labels_of: Callable[[str], Iterable[str]] | None = None
    """What belongs to a text -> labels in it; None if the objective has none."""


def _collate_masked(batch: PackedBatch, vocabulary: Vocabulary, config: ObjectiveConfig, seed: int) -> Inputs:
    tokens_BT, masked_N, targets_N = masked.mask(batch, vocabulary, config, seed)
    model = {
        "tokens_BT": torch.from_numpy(tokens_BT),
        "segments_BT": torch.from_numpy(batch.segments_BT),
        "offsets_BT": torch.from_numpy(batch.offsets_BT).long(),
        "masked_N": torch.from_numpy(masked_N),
    }
    rows_N = masked_N // batch.tokens_BT.shape[1]
    return Inputs(model, torch.from_numpy(targets_N), rows_N, vocabulary.characters_V[targets_N])


def _collate_pairs(batch: PackedBatch, vocabulary: Vocabulary, _: ObjectiveConfig, __: int) -> Inputs:
    model, targets_N = translation.collate(batch, vocabulary)
    rows_N = model["predicted_N"].numpy() // batch.tokens_BT.shape[1]
    return Inputs(model, torch.from_numpy(targets_N), rows_N, vocabulary.characters_V[targets_N])


def _collate_labels(batch: PackedBatch, _: Vocabulary, __: ObjectiveConfig, ___: int) -> Inputs:
    model, targets_N = labels.collate(batch)
    rows_N = model["labelled_N"].numpy() // batch.tokens_BT.shape[1]
    # A label stands for no character: bits per character mean nothing here.
    return Inputs(model, torch.from_numpy(targets_N), rows_N, np.zeros(len(targets_N), np.int64))


def _labelling(
    cutter: Callable[[Encoder, dict[str, int], int], Cutter],
    build: Callable[[ModelConfig, Any, Path | str | None, list[str]], Any],
    labels_of: Callable[[str], Iterable[str]],
) -> Objective:
    """A row for labels of words or of texts."""
    return Objective(
        cutter=lambda encoder, _, sequence_length, found: cutter(
            encoder, labels.numbered(found), sequence_length
        ),
        build=build,
        collate=_collate_labels,
        loss=lambda logits_NK, targets_N, _: labels.loss(logits_NK, targets_N),
        special_tokens=("pad_token",),
        labels_of=labels_of,
    )


OBJECTIVES = {
    "masked": Objective(
        cutter=lambda encoder, _, sequence_length, __: Texts(encoder, sequence_length),
        build=lambda config, tokens, folder, _: backbone.build(config, tokens, folder),
        collate=_collate_masked,
        loss=lambda logits_NV, targets_N, _: masked.loss(logits_NV, targets_N),
        special_tokens=("mask_token", "pad_token"),
    ),
    "translation": Objective(
        cutter=lambda encoder, names, sequence_length, _: translation.pairs(encoder, names, sequence_length),
        build=lambda config, tokens, folder, _: translator.build(config, tokens, folder),
        collate=_collate_pairs,
        loss=translation.loss,
        special_tokens=("pad_token", "eos_token"),
        language_tokens=lambda names: sorted({one for both in translation.directions(names) for one in both}),
    ),
    "tagging": _labelling(labels.Words, labeller.build_words, lambda tags: tags.split(" ")),
    "classification": _labelling(labels.Texts, labeller.build_texts, lambda label: [label]),
}
