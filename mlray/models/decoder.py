"""Decoders of `transformers` (GPT-2, Llama, Qwen2) that read packed rows: causal inside one document, blind to others.

Nothing is patched. Shape letters: B rows, T tokens, N predicted positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mlray.config import ConfigError
from mlray.config import Model as ModelConfig
from mlray.models import loading
from mlray.models.tokenizer import BYTE_WORDS


@dataclass(frozen=True)
class Family:
    """What differs between decoder families."""

    config: Callable[..., Any]
    sizes: Callable[[ModelConfig], dict[str, Any]]
    """Arguments of `config` beyond the common ones, from our configuration."""


def _gpt2_sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_inner": config.intermediate_size,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.weights_dropout,
    }


def _rotary_sizes(config: ModelConfig) -> dict[str, Any]:
    """Of the families that drop nothing but attention weights."""
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_heads,
        "attention_dropout": config.weights_dropout,
    }


FAMILIES = {
    "gpt2": Family(transformers.GPT2Config, _gpt2_sizes),
    "llama": Family(transformers.LlamaConfig, _rotary_sizes),
    "qwen2": Family(transformers.Qwen2Config, _rotary_sizes),
}


class PackedDecoder(torch.nn.Module):
    """A causal model of `transformers` that reads packed rows."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.first_position = 0
        self._window = getattr(model.config, "sliding_window", None)

    def read(
        self,
        segments_BT: torch.Tensor,
        offsets_BT: torch.Tensor,
        predicted_N: torch.Tensor,
        **told: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states (N, H) at the flat positions `predicted_N` (row x T + column).

        `told` is `input_ids` (B, T) or `inputs_embeds` (B, T, H).
        """
        hidden_BTH: torch.Tensor = self.model.base_model(
            **told,
            attention_mask=self._attention(segments_BT, offsets_BT),
            position_ids=offsets_BT,
            use_cache=False,
        )[0]
        return hidden_BTH.flatten(0, 1).index_select(0, predicted_N)

    def _attention(
        self, segments_BT: torch.Tensor, offsets_BT: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
        causal_B1TT = same_B1TT & torch.ones_like(same_B1TT[0, 0]).tril()
        if self._window is None:
            return causal_B1TT
        # A ready mask reaches every layer as it is, so the local layers' window has to be in it.
        near_B1TT = ((offsets_BT[:, :, None] - offsets_BT[:, None, :]) < self._window)[:, None]
        return {"full_attention": causal_B1TT, "sliding_attention": causal_B1TT & near_B1TT}


class Decoder(PackedDecoder):
    """A causal language model with its head on predicted positions only."""

    def forward(
        self,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor,
        offsets_BT: torch.Tensor,
        predicted_N: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (N, V) of the token after each flat position `predicted_N`."""
        hidden_NH = self.read(segments_BT, offsets_BT, predicted_N, input_ids=tokens_BT)
        logits_NV: torch.Tensor = self.model.lm_head(hidden_NH)
        return logits_NV


def build(
    config: ModelConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
    folder: Path | str | None = None,
    *,
    paired: bool = False,
) -> Decoder:
    """A language model to train; see `open_model`.

    Args:
        config: of the model.
        tokenizer: its tokenizer.
        folder: of a checkpoint.
        paired: whether it learns prompts with what answers them; kept in its settings for whoever lets it write.
    """
    model = open_model(config, tokenizer, folder)
    model.config.prompt_completion = paired
    return Decoder(model)


def is_paired(model: transformers.PreTrainedModel) -> bool:
    """Whether it was trained by `build` on prompts with what answers them: it then writes after `<end>`."""
    return bool(getattr(model.config, "prompt_completion", False))


def open_model(
    config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast, folder: Path | str | None = None
) -> transformers.PreTrainedModel:
    """A fresh model from the configuration, or the checkpoint at `folder` (also a hub name).

    Raises:
        ConfigError: the checkpoint is of another family, is no safetensors file, or its vocabulary does not fit; or
            a fresh model could not be opened with the tokenizer.
    """
    if folder is None:
        _check_reopens(config, tokenizer)
        return _fresh(config, tokenizer)
    found: transformers.PreTrainedModel = loading.load(
        transformers.AutoModelForCausalLM, config, tokenizer, folder
    )
    return found


def _fresh(
    config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast
) -> transformers.PreTrainedModel:
    family = FAMILIES[config.family]
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    settings = family.config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_positions,
        initializer_range=config.hidden_size**-0.5 / 2,
        # The embedding of a padding token is never learnt, and that of the end must be.
        pad_token_id=None if pad == end else pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        tie_word_embeddings=True,
        **family.sizes(config),
    )
    settings._attn_implementation = "sdpa"
    return transformers.AutoModelForCausalLM.from_config(settings)


def _check_reopens(config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """`AutoTokenizer` builds the tokenizer of a Qwen2 folder as Qwen2's own kind, whatever kind was saved in it."""
    if config.family != "qwen2":
        return
    before = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if {"Regex": BYTE_WORDS} not in [split.get("pattern") for split in before.get("pretokenizers", [])]:
        raise ConfigError(
            "model.family=qwen2 reads bytes split as Qwen2 splits them; set tokenizer.algorithm=byte_bpe or "
            "model.family=llama"
        )
