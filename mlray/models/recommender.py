"""A sequence model over the items of a session, with scores of the candidates that it is asked for.

A decoder (GPT-2, Llama, Qwen2) reads the market and the items before (SASRec, Kang and McAuley 2018). Shape letters:
B rows, T tokens, N predicted positions, M candidates, H hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from mlray.config import Model as ModelConfig
from mlray.models import decoder


class Recommender(decoder.PackedDecoder):
    """Scores of items by the products of their embeddings with what the session has become."""

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
        hidden_NH = self.read(tokens_BT, segments_BT, offsets_BT, predicted_N)
        items_MH = self.model.get_input_embeddings()(candidates_M)
        logits_NM: torch.Tensor = hidden_NH @ items_MH.T - drawn_M.to(hidden_NH.dtype)
        return logits_NM


def build(
    config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast, folder: Path | str | None = None
) -> Recommender:
    """A fresh model from the configuration, or the checkpoint at `folder`; see `decoder.open_model`."""
    return Recommender(decoder.open_model(config, tokenizer, folder))
