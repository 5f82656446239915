"""Checkpoints of `transformers` as they are trained on: safetensors only, of the family that is configured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from mlray.config import ConfigError
from mlray.config import Model as ModelConfig

_DROPOUT = ("hidden_dropout_prob", "embedding_dropout", "mlp_dropout", "dropout", "resid_pdrop", "embd_pdrop")
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
"""What the families call it."""
_SELDOM_DROPOUT = ("activation_dropout", "classifier_dropout")
"""A fresh model has none there: only what a checkpoint has is replaced."""
_LAYER_DROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def load(
    kind: Any,
    config: ModelConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
    folder: Path | str,
    **names: Any,
) -> Any:
    """A checkpoint in fp32 as a class of `transformers`, with settings of that class such as the names of labels.

    What it has no tensors for, such as the head of a task, is drawn anew and named in `fresh_tensors`.

    Raises:
        ConfigError: it is no safetensors checkpoint, of another family, or does not fit (see `check_loaded`).
    """
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **names)
        check_family(settings.model_type, config)  # `kind` may know nothing of another
        _set_dropout(settings, config)
        model, told = kind.from_pretrained(
            folder,
            config=settings,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"no safetensors checkpoint at {config.path}: {str(error).splitlines()[0]}"
        ) from error
    check_loaded(model, config, tokenizer)
    inner = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    drawn = told["missing_keys"] & {name for name, _ in model.named_parameters()}
    fresh = sorted(name for name in drawn if "pooler." not in name)
    if lost := [name for name in fresh if name.startswith(inner)]:  # else they would silently be random
        raise ConfigError(f"{config.path} has no tensor {lost[0]}, a part of the {config.family} backbone")
    model.fresh_tensors = fresh
    return model


def _set_dropout(settings: Any, config: ModelConfig) -> None:
    """Puts the configuration's dropout, where it names one, in the place of the checkpoint's own; drops no layers."""
    seldom = [name for name in _SELDOM_DROPOUT if getattr(settings, name, None)]
    attention = config.dropout if config.attention_dropout is None else config.attention_dropout
    rates = {
        **dict.fromkeys((*_DROPOUT, *seldom), config.dropout),
        **dict.fromkeys(_ATTENTION_DROPOUT, attention),
        # Each worker would draw which layers it leaves out, and reduce gradients that the others have not.
        **dict.fromkeys(_LAYER_DROP, 0.0),
    }
    for name, rate in rates.items():
        if rate is not None and hasattr(settings, name):
            setattr(settings, name, rate)


def check_family(found: str, config: ModelConfig) -> None:
    """Refuses a checkpoint of another family than that of the section.

    Raises:
        ConfigError: it names the checkpoint and its family.
    """
    if found != config.family:
        raise ConfigError(f"{config.path} is a {found} checkpoint; set model.family to it")


def check_loaded(
    model: transformers.PreTrainedModel,
    config: ModelConfig,
    tokenizer: transformers.PreTrainedTokenizerFast,
) -> None:
    """Refuses a checkpoint with a smaller vocabulary or with other special tokens.

    Raises:
        ConfigError: it names the two things that do not fit.
    """
    if model.config.vocab_size < len(tokenizer):
        raise ConfigError(
            f"{config.path} has {model.config.vocab_size} token embeddings and the tokenizer {len(tokenizer)} tokens; "
            "set tokenizer.path to the checkpoint's own"
        )
    two_stacks = model.config.is_encoder_decoder
    if model.can_generate() and not two_stacks:
        return  # nobody reads the padding of a decoder, and many have none
    for name in ("pad", "eos") if two_stacks else ("pad",):  # rows are padded by one and read by the other
        own, other = (getattr(one, f"{name}_token_id") for one in (model.config, tokenizer))
        if None not in (own, other) and own != other:
            raise ConfigError(
                f"{config.path} has the {name} token {own} and the tokenizer {other}; set tokenizer.path to the "
                "checkpoint's own"
            )
