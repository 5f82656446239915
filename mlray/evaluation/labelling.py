"""Lets a model label words or texts: the same cutting, packing and forward as in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlray.config import RunConfig
from mlray.corpus import packing, validation
from mlray.corpus.records import Record
from mlray.corpus.windows import Window
from mlray.models import adapters, labeller, tokenizer
from mlray.objectives import labels
from mlray.objectives.table import OBJECTIVES
from mlray.schema import PackedBatch


class Judge:
    """A model that labels, with its tokenizer and labels."""

    def __init__(
        self, config: RunConfig, folder: Path, adapter: Path | None = None, language: Path | None = None
    ) -> None:
        """Opens the checkpoint at `folder`, and an adapter on it, if one is named, with its language adapter.

        Raises:
            ConfigError: it is none for the objective, or the adapter is none for it.
        """
        objective = OBJECTIVES[config.objective.name]
        self._config = config
        self._tokens = tokenizer.load(folder, objective.special_tokens)
        self._labels = adapters.labels_of(adapter) if adapter else labeller.labels_of(folder)
        self._model = objective.build(config.model, self._tokens, folder, self._labels)
        if adapter:
            adapters.load(self._model, adapter, language)
        self._model.eval()
        encoder = tokenizer.encoder(self._tokens)
        self._cutter = objective.cutter(encoder, [], config.corpus.sequence_length, self._labels)

    def label(self, rows: Sequence[Record]) -> list[list[str]]:
        """The labels of each row: one a word, or one for the text.

        Raises:
            ConfigError: a row whose own labels the training did not know, or are not one a word.
        """
        window = Window(
            0,
            [row.text for row in rows],
            [row.pair for row in rows],
            [0] * len(rows),
            list(range(len(rows))),
        )
        pieces = self._cutter(window)
        numbered = [piece._replace(document=number) for number, piece in enumerate(pieces)]
        length = self._config.corpus.sequence_length
        table = packing.pack_pieces(numbered, self._cutter.encoder.pad_id, length, 0, seed=0)
        found: dict[int, list[str]] = {}
        for batch in validation.batches(table, self._config.train.micro_batch_size):
            for place, number in self._forward(batch):
                found.setdefault(place, []).append(self._labels[number])
        result: list[list[str]] = [[] for _ in rows]
        for number, piece in enumerate(pieces):
            result[piece.document] += found.get(number, [])
        return result

    @torch.inference_mode()
    def _forward(self, batch: PackedBatch) -> list[tuple[int, int]]:
        """(piece, label) of every labelled position, in order."""
        inputs, _ = labels.collate(batch)
        best_N: Any = self._model(**inputs).argmax(-1).numpy()
        flat_N = inputs["labelled_N"].numpy()
        first_B = np.searchsorted(batch.batch_D, np.arange(len(batch)))
        rows_N = flat_N // batch.tokens_BT.shape[1]
        places_N = first_B[rows_N] + batch.segments_BT.ravel()[flat_N] - 1
        return list(zip(batch.documents_D[places_N].tolist(), best_N.tolist(), strict=True))
