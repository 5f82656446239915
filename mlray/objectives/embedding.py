"""Vectors of texts, read as the contrastive objective reads them: cut, packed without padding, pooled.

Shape letters: N texts, H width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from mlray.config import RunConfig
from mlray.corpus import packing
from mlray.models import adapters, backbone, embedder, tokenizer
from mlray.models.mixed import Mixed
from mlray.objectives import pairing

_ROWS = 32
"""Packed rows of one forward pass."""


class TextEmbedder:
    """A trained encoder with its tokenizer."""

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
            ConfigError: it is no encoder of `model.family`, or the adapter is none for it.
        """
        tokens = tokenizer.load(folder)
        pooling = embedder.pooling_of(folder) or config.contrastive.pooling
        self._model = embedder.build(
            config.model, config.contrastive.model_copy(update={"pooling": pooling}), tokens, folder
        )
        wrapped = None
        if adapter:
            wrapped = adapters.load(self._model, adapter, language, objective="contrastive")
        self._mixed = Mixed(self._model, adapter, wrapped)
        self.encoder = tokenizer.encoder(tokens)
        self._length = min(config.corpus.sequence_length, backbone.positions(self._model))
        self._device = device
        self._model.to(device).eval()

    @property
    def room(self) -> int:
        """Tokens of a text that are read."""
        return self._length - 2

    def embed(self, texts: Sequence[str], names: Sequence[str | None] | None = None) -> np.ndarray:
        """Unit vectors (N, H) float32; what is longer than `corpus.sequence_length` tokens is cut off.

        Args:
            texts: what is read.
            names: the adapter that reads each, see `read`.
        """
        parts = list(self.stream(texts, names))
        width = int(self._model.model.config.hidden_size)
        found_NH = np.empty((len(texts), width), np.float32)
        for places, vectors in parts:
            found_NH[places] = vectors
        return found_NH

    def stream(
        self, texts: Sequence[str], names: Sequence[str | None] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same in parts: places (n,) in `texts`, and their vectors (n, H)."""
        cut = self.cut(texts)
        rows = packing.best_fit([len(tokens) for tokens in cut], self._length)
        for first in range(0, len(rows), _ROWS):
            places = [number for row in rows[first : first + _ROWS] for number in row]
            asked = None if names is None else [names[i] for i in places]
            yield np.array(places), self.read([cut[i] for i in places], asked)

    def cut(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text as the encoder reads them."""
        start, end, room = self.encoder.start_id, self.encoder.end_id, self.room
        return [[start, *ids[:room], end] for ids in self.encoder.encode(texts)]

    def load(self, name: str, folder: Path) -> None:
        """Opens another adapter for texts that ask for it by this name; see `models.mixed.Mixed.load`."""
        self._mixed.load(name, folder, "contrastive")

    def unload(self, name: str) -> None:
        """Forgets an adapter that was loaded."""
        self._mixed.unload(name)

    def read(self, cut: Sequence[list[int]], names: Sequence[str | None] | None = None) -> np.ndarray:
        """Unit vectors (N, H) float32 of texts that are `cut`, in one forward pass without padding between them.

        Args:
            cut: tokens of each text.
            names: the adapter that reads each; None: the model as it is.

        Raises:
            ConfigError: an adapter is not loaded.
        """
        width = _width([len(tokens) for tokens in cut], self._length)
        inputs = pairing.rows(cut, width, self.encoder.pad_id)
        with self._mixed.reading(names or [None] * len(cut), inputs["texts_BT"]):
            return self._forward(inputs)

    @torch.inference_mode()
    def _forward(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        vectors_NH = self._model(**{name: tensor.to(self._device) for name, tensor in inputs.items()})
        found: np.ndarray = torch.nn.functional.normalize(vectors_NH, dim=-1).cpu().numpy()
        return found


def _width(lengths: Sequence[int], most: int) -> int:
    """A length of rows, `most` at most, with few places that no text fills: they are computed like all others."""
    longest, total = max(lengths), sum(lengths)
    even = (-(-total // (-(-total // most) * parts)) for parts in (1, 2, 4))
    widths = sorted({longest, most, *(max(longest, width) for width in even)})
    return min(widths, key=lambda width: width * len(packing.best_fit(lengths, width)))
