"""Which layers of each family an adapter changes, as `peft` wants it told."""

from __future__ import annotations

import re
from typing import Any

import peft
import torch
from transformers.pytorch_utils import Conv1D

from mlray.config import Adapter, ConfigError
from mlray.models.backbone import Backbone

_HEADS = ("classifier", "pooler", "head")
"""Modules of a task that no backbone brings: they are trained whole and saved beside the adapter."""
_NOT_BACKBONE = r"(lm_head|cls|classifier|head|decoder)(\..*)?|.*\.pooler(\..*)?"
"""An adapter of one task or language must fit the backbone under another head."""
_IA3_TARGETS = {
    "bert": ("key|value", r"layer\.\d+\.output\.dense"),
    "xlm-roberta": ("key|value", r"layer\.\d+\.output\.dense"),
    "modernbert": ("Wqkv", r"mlp\.Wo"),
    "m2m_100": ("k_proj|v_proj", "fc2"),
    "mbart": ("k_proj|v_proj", "fc2"),
    "gpt2": ("c_attn", r"mlp\.c_proj"),
    "llama": ("k_proj|v_proj", "down_proj"),
    "qwen2": ("k_proj|v_proj", "down_proj"),
}
"""Keys and values (with the queries where one matrix makes all three), and the second matrix of the feed-forward, whose
input is scaled (Liu et al. 2022)."""


def settings(model: Backbone, config: Adapter) -> Any:
    """`peft`'s configuration of a fresh adapter.

    Raises:
        ConfigError: the model has no linear layers, or its checkpoint no head for the objective.
    """
    inner, family = model.model, model.model.config.model_type
    if not any(isinstance(part, torch.nn.Linear | Conv1D) for part in inner.modules()):
        raise ConfigError(
            f"adapter.kind={config.kind} wraps linear layers and the model has none; train it whole, with "
            "adapter.kind=none"
        )
    modules = {part for name, _ in inner.named_modules() for part in name.split(".")}
    transposed = family == "gpt2"  # its linear layers are `Conv1D`s of inputs x outputs
    saved = [name for name in _HEADS if name in modules] if "classifier" in modules else None
    for name in getattr(inner, "fresh_tensors", ()):
        if not set(name.split(".")) & set(saved or ()):
            raise ConfigError(
                f"the checkpoint at model.path has no {name}, and below an adapter it would stay as it is drawn; take "
                "one with the objective's head, or train the whole model with adapter.kind=none"
            )
    heads = any(re.fullmatch(_NOT_BACKBONE, name) for name, _ in inner.named_modules())
    excluded = _NOT_BACKBONE if heads else None  # peft complains of what excludes nothing
    if config.kind == "ia3":
        targets, feedforward = _IA3_TARGETS[family]
        return peft.IA3Config(
            target_modules=list(config.targets) or rf".*\.({targets}|{feedforward})",
            feedforward_modules=rf".*\.{feedforward}",
            fan_in_fan_out=transposed,
            exclude_modules=excluded,
            modules_to_save=saved,
        )
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.kind == "dora",
        fan_in_fan_out=transposed,
        target_modules=list(config.targets) or "all-linear",
        exclude_modules=excluded,
        modules_to_save=saved,
    )
