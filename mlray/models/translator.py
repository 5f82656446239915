"""Encoder-decoders of `transformers` (M2M-100, mBART) that read packed rows of translation pairs.

A pair lies in the same columns of two arrays, so one matrix says who sees whom in the encoder, in the decoder and
across. Nothing is patched: these families add position embeddings themselves, counted from the row's start; what they
will add is taken off the input embeddings and that of the place in the document put in its stead.
Shape letters: B rows, T tokens, N predicted positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mlray.config import Model as ModelConfig
from mlray.models import loading


@dataclass(frozen=True)
class Family:
    """What differs between encoder-decoder families."""

    config: Callable[..., Any]
    positions: Callable[[Any, torch.Tensor], torch.Tensor]
    """The position embeddings (..., H) that an encoder or decoder of the family has for places (...), from 0."""


def _sinusoidal(stack: Any, places: torch.Tensor) -> torch.Tensor:
    table = stack.embed_positions
    last = int(table.padding_idx) + 1 + int(places.max())
    if last >= len(table.weights):
        table.make_weights(last + 1 + table.offset, table.embedding_dim, table.padding_idx)
    embedded: torch.Tensor = table.weights[places + table.padding_idx + 1]
    return embedded


def _learned(stack: Any, places: torch.Tensor) -> torch.Tensor:
    flat = places.flatten()
    embedded: torch.Tensor = stack.embed_positions(flat, position_ids=flat)
    return embedded.view(*places.shape, -1)


FAMILIES = {
    "m2m_100": Family(transformers.M2M100Config, _sinusoidal),
    "mbart": Family(transformers.MBartConfig, _learned),
}


class Translator(torch.nn.Module):
    """An encoder-decoder with its head on predicted positions only."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.family = FAMILIES[model.config.model_type]
        self.first_position = 0

    def forward(
        self,
        source_BT: torch.Tensor,
        target_BT: torch.Tensor,
        segments_BT: torch.Tensor,
        offsets_BT: torch.Tensor,
        predicted_N: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (N, V) at the flat positions `predicted_N` (row x T + column) of the decoder.

        Args:
            source_BT: what the encoder reads; padding after the source inside its document's columns.
            target_BT: what the decoder reads, already shifted; padding likewise.
            segments_BT: number of the document, 0 for padding.
            offsets_BT: place in the document, from 0.
            predicted_N: int64 flat positions.
        """
        same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
        real_B11T = (source_BT != self.model.config.pad_token_id)[:, None, None, :]
        # A softmax over nothing is no number: padding between documents, which nobody reads, sees padding.
        readable_B1TT = same_B1TT & (real_B11T | (segments_BT == 0)[:, None, None, :])
        causal_B1TT = same_B1TT & torch.ones_like(same_B1TT[0, 0]).tril()
        encoder, decoder = self.model.get_encoder(), self.model.get_decoder()
        memory_BTH = encoder(
            inputs_embeds=self._embed(encoder, source_BT, offsets_BT), attention_mask=readable_B1TT
        )[0]
        hidden_BTH = decoder(
            inputs_embeds=self._embed(decoder, target_BT, offsets_BT),
            attention_mask=causal_B1TT,
            encoder_hidden_states=memory_BTH,
            encoder_attention_mask=readable_B1TT,
            use_cache=False,
        )[0]
        logits_NV: torch.Tensor = self.model.lm_head(hidden_BTH.flatten(0, 1).index_select(0, predicted_N))
        bias = getattr(self.model, "final_logits_bias", None)
        return logits_NV if bias is None else logits_NV + bias

    def _embed(self, stack: Any, tokens_BT: torch.Tensor, offsets_BT: torch.Tensor) -> torch.Tensor:
        columns_1T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        moved_BTH = self.family.positions(stack, offsets_BT) - self.family.positions(stack, columns_1T)
        embedded_BTH: torch.Tensor = stack.embed_tokens(tokens_BT)
        return embedded_BTH + moved_BTH


def build(
    config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast, folder: Path | str | None = None
) -> Translator:
    """A fresh model from the configuration, or the checkpoint at `folder` (also a hub name).

    Raises:
        ConfigError: the checkpoint is of another family, is no safetensors file, or its vocabulary does not fit.
    """
    if folder is None:
        return Translator(_fresh(config, tokenizer))
    return Translator(loading.load(transformers.AutoModelForSeq2SeqLM, config, tokenizer, folder))


def _fresh(
    config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast
) -> transformers.PreTrainedModel:
    settings = FAMILIES[config.family].config(
        vocab_size=len(tokenizer),
        d_model=config.hidden_size,
        encoder_layers=config.num_layers,
        decoder_layers=config.num_layers,
        encoder_attention_heads=config.num_heads,
        decoder_attention_heads=config.num_heads,
        encoder_ffn_dim=config.intermediate_size,
        decoder_ffn_dim=config.intermediate_size,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        dropout=config.hidden_dropout,
        attention_dropout=config.weights_dropout,
        activation_dropout=0.0,
        max_position_embeddings=config.max_positions,
        init_std=config.hidden_size**-0.5 / 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )
    settings._attn_implementation = "sdpa"
    return transformers.AutoModelForSeq2SeqLM.from_config(settings)
