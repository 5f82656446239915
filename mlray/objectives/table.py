"""The table of objectives: which inputs a batch becomes, and the loss on the model's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mlray.config import Objective as ObjectiveConfig
from mlray.models.tokenizer import Vocabulary
from mlray.objectives import masked
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

    collate: Callable[[PackedBatch, Vocabulary, ObjectiveConfig, int], Inputs]
    """(batch, vocabulary, configuration, seed) -> inputs."""
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(logits_NV, targets_N) -> sum over N, in nats."""
    trains: str
    """`backbone` or `adapter`."""


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


OBJECTIVES = {"masked": Objective(_collate_masked, masked.loss, trains="backbone")}
