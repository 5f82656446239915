"""A sequence model over the items of a session, with scores of the candidates that it is asked for.

A decoder (GPT-2, Llama, Qwen2) reads the market and the items before (SASRec, Kang and McAuley 2018). An item is what
is learnt of its id and, where vectors of texts are given, what is learnt to be made of its text's. Shape letters:
B rows, T tokens, N predicted positions, M candidates, V vocabulary, W width of a text's vector, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mlray.config import Model as ModelConfig
from mlray.models import backbone, decoder


class Recommender(decoder.PackedDecoder):
    """Scores of items by the products of their embeddings with what the session has become."""

    _vectors_VW: torch.Tensor

    def __init__(self, model: transformers.PreTrainedModel, vectors_VW: np.ndarray | None = None) -> None:
        """
        Args:
            model: with an embedding for each token.
            vectors_VW: of the texts of the items, 0 for a token without one; its embedding is then learnt from 0 on, as
                what is beside the text.
        """
        super().__init__(model)
        self._projection: torch.nn.Linear | None = None
        if vectors_VW is not None:
            self.register_buffer("_vectors_VW", torch.from_numpy(vectors_VW), persistent=False)
            self._projection = torch.nn.Linear(vectors_VW.shape[1], model.config.hidden_size, bias=False)
            embeddings_VH = model.get_input_embeddings().weight
            with torch.no_grad():
                known_V = self._vectors_VW.any(dim=1)
                # A unit vector becomes as long as an embedding is.
                torch.nn.init.normal_(self._projection.weight, std=float(embeddings_VH.std()))
                embeddings_VH[known_V] = 0.0

    def forward(
        self,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor,
        offsets_BT: torch.Tensor,
        predicted_N: torch.Tensor,
        candidates_M: torch.Tensor,
        drawn_M: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (N, M) of each candidate as the item after each flat position `predicted_N`.

        `drawn_M`, the logarithm of how likely it is that a candidate is drawn, is taken off, so that what is drawn
        often is not held for wrong often (log-Q correction, Yi et al. 2019).
        """
        items_BTH = self._embedded(tokens_BT)
        hidden_NH = self.read(segments_BT, offsets_BT, predicted_N, inputs_embeds=items_BTH)
        logits_NM: torch.Tensor = hidden_NH @ self._embedded(candidates_M).T
        return logits_NM.float() - drawn_M

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.get_input_embeddings()(tokens)
        return found if self._projection is None else found + self._projection(self._vectors_VW[tokens])

    def whole(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a model whose embeddings hold what is made of the texts: nothing else is needed any more."""
        if self._projection is None:
            return weights
        made_WH = weights["_projection.weight"].T
        place = next(
            name for name, one in self.named_parameters() if one is self.model.get_input_embeddings().weight
        )
        embeddings_VH = weights[place] + self._vectors_VW.to(made_WH) @ made_WH
        return {name: one for name, one in weights.items() if name != "_projection.weight"} | {
            place: embeddings_VH
        }


def build(
    config: ModelConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
    folder: Path | str | None = None,
    vectors_VW: np.ndarray | None = None,
) -> Recommender:
    """A fresh model from the configuration, or the checkpoint at `folder`; see `decoder.open_model`."""
    return Recommender(decoder.open_model(config, tokenizer, folder), vectors_VW)


def export(model: Recommender, tokens: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes what `backbone.export` does, of embeddings that are complete.

    Raises:
        OSError: a file could not be written.
    """
    backbone.export(model, tokens, model.whole(weights), folder)
