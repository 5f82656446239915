"""Scores of every item as the next one of a session, read as training reads sessions.

Shape letters: Q sessions, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mlray.config import RunConfig
from mlray.models import adapters, backbone, recommender, tokenizer
from mlray.models.mixed import Mixed
from mlray.objectives import next_item


class NextItem:
    """A trained recommender with its catalogue."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path | str,
        adapter: Path | None = None,
        language: Path | None = None,
        device: str = "cpu",
    ) -> None:
        """Opens the checkpoint at `folder`, and an adapter on it, if one is named, with its language adapter.

        Raises:
            ConfigError: it is no decoder of `model.family`, or the adapter is none for it.
        """
        tokens = tokenizer.load(folder, ("pad_token",))
        self._model = recommender.build(config.model, tokens, folder)
        wrapped = None
        if adapter:
            wrapped = adapters.load(self._model, adapter, language, objective="next_item")
        self._mixed = Mixed(self._model, adapter, wrapped)
        self._device = device
        self._model.to(device).eval()
        self._vocabulary = tokenizer.vocabulary(tokens)
        self._encoder = tokenizer.encoder(tokens)
        self._length = min(config.corpus.sequence_length, backbone.positions(self._model))
        self._cutter = next_item.sessions(self._encoder, self._vocabulary, self.markets, self._length)
        self.items: dict[str, int] = {
            item: number
            for item, number in tokens.get_vocab().items()
            if number < self._vocabulary.size and not self._vocabulary.special_V[number]
        }
        """Every item of the catalogue, and its column of the scores."""

    @property
    def markets(self) -> list[str]:
        """Those that the model knows."""
        return sorted(self._encoder.language_ids)

    @property
    def adapters(self) -> list[str]:
        """The markets whose sessions an adapter of their own reads."""
        return self._mixed.names

    def load(self, market: str, folder: Path) -> None:
        """Opens the adapter of a market, which reads its sessions from now on; see `models.mixed.Mixed.load`."""
        self._mixed.load(market, folder, "next_item")

    def check(self, markets: Sequence[str]) -> None:
        """Refuses markets that the model does not know.

        Raises:
            ConfigError: it names one.
        """
        next_item.markets(self._encoder, markets)

    @torch.inference_mode()
    def vectors(self, items: Sequence[str]) -> np.ndarray:
        """What is learnt of each item, as unit vectors (N, H) float32; 0 for one that the model does not know."""
        table_VH = self._model.model.get_input_embeddings().weight
        found_NH = torch.zeros(len(items), table_VH.shape[1])
        known = [place for place, item in enumerate(items) if item in self.items]
        rows = [self.items[items[place]] for place in known]
        found_NH[known] = torch.nn.functional.normalize(table_VH[rows].float().cpu(), dim=-1)
        found: np.ndarray = found_NH.numpy()
        return found

    @torch.inference_mode()
    def scores(self, sessions: Sequence[str], markets: Sequence[str]) -> np.ndarray:
        """Logits (Q, V) float32 of each item as the next one of each session, in one forward pass.

        Of a session that is longer than a row its last items are read; those that the model does not know are left out.

        Args:
            sessions: items with a space between, and before them the words of a query, see `corpus.sessions`.
            markets: of each session.

        Raises:
            ConfigError: the model does not know a market.
        """
        starts = next_item.markets(self._encoder, markets)
        rows = [
            [start, *asked, *ids[-(self._length - 1 - len(asked)) :]]
            for start, (asked, ids) in zip(starts, self._cutter.ids(sessions), strict=True)
        ]
        width = max(map(len, rows))
        tokens_QT = torch.full((len(rows), width), self._encoder.pad_id)
        segments_QT = torch.zeros((len(rows), width), dtype=torch.int32)
        for row, ids in enumerate(rows):
            tokens_QT[row, : len(ids)], segments_QT[row, : len(ids)] = torch.tensor(ids), 1
        last_Q = torch.tensor([row * width + len(ids) - 1 for row, ids in enumerate(rows)])
        candidates_V = torch.arange(self._vocabulary.size)
        inputs = {
            "tokens_BT": tokens_QT,
            "segments_BT": segments_QT,
            "offsets_BT": torch.arange(width).expand(len(rows), -1),
            "predicted_N": last_Q,
            "candidates_M": candidates_V,
            "drawn_M": torch.zeros(len(candidates_V)),
        }
        own = set(self.adapters)
        sessions_QT = torch.arange(len(rows))[:, None].expand_as(tokens_QT)
        with self._mixed.reading([market if market in own else None for market in markets], sessions_QT):
            found_QV = self._model(**{name: one.to(self._device) for name, one in inputs.items()})
        found: np.ndarray = found_QV.cpu().numpy()
        return found
