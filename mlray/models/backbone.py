"""Encoder backbones with a masked-language head that is computed on masked positions only.

Every family comes from `transformers`; nothing is patched. Shape letters: B rows, T tokens, N masked
positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from mlray.config import Model as ModelConfig
from mlray.models import loading


@dataclass(frozen=True)
class Family:
    """What differs between encoder families."""

    config: Callable[..., Any]
    first_position: Callable[[Any], int]
    """Position id of the first token: XLM-R counts from the one after the padding token's id."""
    head: Callable[[Any, torch.Tensor], torch.Tensor]
    """The language-model head of a loaded model on hidden states (N, H)."""
    sizes: Callable[[ModelConfig, int], dict[str, Any]]
    """Arguments of `config` beyond the common ones, from our configuration and the padding token."""


def _bert_sizes(config: ModelConfig, _: int) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.max_positions,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.weights_dropout,
    }


def _xlm_roberta_sizes(config: ModelConfig, pad_id: int) -> dict[str, Any]:
    rows = config.max_positions + pad_id + 1
    return {**_bert_sizes(config, pad_id), "max_position_embeddings": rows, "type_vocab_size": 1}


def _modernbert_sizes(config: ModelConfig, _: int) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.max_positions,
        "embedding_dropout": config.hidden_dropout,
        "attention_dropout": config.weights_dropout,
        "mlp_dropout": config.hidden_dropout,
    }


class Backbone(Protocol):
    """A model of `transformers` behind a forward that reads packed rows."""

    model: Any
    first_position: int

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Its weights."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Its weights by name."""
        ...


FAMILIES = {
    "bert": Family(
        transformers.BertConfig, lambda _: 0, lambda model, hidden: model.cls(hidden), _bert_sizes
    ),
    "xlm-roberta": Family(
        transformers.XLMRobertaConfig,
        lambda config: int(config.pad_token_id) + 1,
        lambda model, hidden: model.lm_head(hidden),
        _xlm_roberta_sizes,
    ),
    "modernbert": Family(
        transformers.ModernBertConfig,
        lambda _: 0,
        lambda model, hidden: model.decoder(model.head(hidden)),
        _modernbert_sizes,
    ),
}


class PackedEncoder(torch.nn.Module):
    """An encoder of `transformers`, whatever its head, that reads packed rows."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.family = FAMILIES[model.config.model_type]
        self.first_position = self.family.first_position(model.config)
        self._window = model.config.sliding_window if model.config.model_type == "modernbert" else None

    def read(
        self, tokens_BT: torch.Tensor, segments_BT: torch.Tensor, offsets_BT: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states (B, T, H).

        Attention stays inside a document: token i sees token j where their segment numbers are equal.
        """
        hidden_BTH: torch.Tensor = self.model.base_model(
            input_ids=tokens_BT,
            attention_mask=self._attention(segments_BT, offsets_BT),
            position_ids=offsets_BT + self.first_position,
        )[0]
        return hidden_BTH

    def _attention(
        self, segments_BT: torch.Tensor, offsets_BT: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
        if self._window is None:
            return same_B1TT
        # A ready mask reaches every layer as it is, so the local layers' window has to be in it.
        near_B1TT = ((offsets_BT[:, :, None] - offsets_BT[:, None, :]).abs() <= self._window)[:, None]
        return {"full_attention": same_B1TT, "sliding_attention": same_B1TT & near_B1TT}


class MaskedEncoder(PackedEncoder):
    """A masked-language model with its head on masked positions only."""

    def forward(
        self,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor,
        offsets_BT: torch.Tensor,
        masked_N: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (N, V) at the flat positions `masked_N` (row x T + column)."""
        hidden_BTH = self.read(tokens_BT, segments_BT, offsets_BT)
        return self.family.head(self.model, hidden_BTH.flatten(0, 1).index_select(0, masked_N))


def build(
    config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast, folder: Path | str | None = None
) -> MaskedEncoder:
    """A fresh model from the configuration, or the checkpoint at `folder` (also a hub name).

    Raises:
        ConfigError: the checkpoint is of another family, is no safetensors file, or its vocabulary does not fit.
    """
    if folder is None:
        return MaskedEncoder(transformers.AutoModelForMaskedLM.from_config(settings(config, tokenizer)))
    return MaskedEncoder(loading.load(transformers.AutoModelForMaskedLM, config, tokenizer, folder))


def settings(config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast) -> Any:
    """The `transformers` configuration of a fresh encoder."""
    family = FAMILIES[config.family]
    sizes = family.sizes(config, int(tokenizer.pad_token_id))
    fresh = family.config(**_common(config, tokenizer), **sizes)
    fresh._attn_implementation = "sdpa"
    return fresh


def _common(config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerFast) -> dict[str, Any]:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id if start is None else start,
        "eos_token_id": tokenizer.sep_token_id if end is None else end,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }


def quiet() -> None:
    """Keeps the library's own progress bars and notes, such as on a head that is new, out of the run's output."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def positions(encoder: Backbone) -> int:
    """Longest row that the model can read."""
    return int(encoder.model.config.max_position_embeddings) - encoder.first_position


def export(
    encoder: Backbone,
    tokenizer: transformers.PreTrainedTokenizerFast,
    weights: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    """Writes fp32 weights (by parameter name) and tokenizer so that plain `from_pretrained` opens them.

    Raises:
        OSError: a file could not be written, by either library.
    """
    state = _buffers(encoder.model) | plain_names(encoder, weights)
    encoder.model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    # `save_pretrained` notes the dtype that the model computes in, and `from_pretrained` would cast to it.
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def _buffers(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """What belongs to a checkpoint and is no parameter, such as the bias that mBART adds to its logits."""
    names = {name for name, _ in model.named_buffers()}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}


def plain_names(encoder: Backbone, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names that they have in a checkpoint, instead of those of our parameters."""
    # A tied tensor must lie under the name that every head's model looks for: XLM-R's first name of its embeddings is
    # that of its language-model head.
    tied = encoder.model.all_tied_weights_keys
    names = {name: name.removeprefix("model.") for name in weights}
    return {tied.get(names[name], names[name]): tensor for name, tensor in weights.items()}


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a tokenizer.

    Raises:
        OSError: a file could not be written.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except OSError:
        raise
    except Exception as error:  # the Rust tokenizer tells a full disk as a bare Exception
        raise OSError(str(error)) from error
