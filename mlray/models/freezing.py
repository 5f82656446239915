"""Partial fine-tuning: the first layers, or the embeddings, of a model stay as they are."""

from __future__ import annotations

import re

import torch

from mlray.config import ConfigError, Train
from mlray.models.backbone import Backbone

_LAYER = re.compile(r"\.(?:layers?|h)\.(\d+)\.")
"""The place of a layer in the names of every family of the table."""
_EMBEDDING = re.compile(r"\.(?:embeddings|embed_tokens|embed_positions|layernorm_embedding|shared|wte|wpe)\.")


def freeze(model: Backbone, config: Train) -> dict[str, torch.Tensor]:
    """Freezes what `train.freeze_layers` and `freeze_embeddings` name.

    A head that is tied to the embeddings is frozen with them.

    Returns:
        Copies of the frozen tensors by name, for the export: the engine may take the parameters themselves apart.

    Raises:
        ConfigError: the model has fewer layers.
    """
    if not config.freeze_layers and not config.freeze_embeddings:
        return {}
    inner = dict(model.model.base_model.named_parameters(prefix="."))
    places = {int(match[1]) for name in inner if (match := _LAYER.search(name))}
    if config.freeze_layers > len(places):
        raise ConfigError(
            f"train.freeze_layers={config.freeze_layers}, and the model has {len(places)} layers"
        )
    # XLM-R's embeddings have their first name from the head that they are tied to.
    names = {parameter: name for name, parameter in model.named_parameters()}
    kept: dict[str, torch.Tensor] = {}
    for name, parameter in inner.items():
        layer = _LAYER.search(name)
        low = layer is not None and int(layer[1]) < config.freeze_layers
        if low or (config.freeze_embeddings and _EMBEDDING.search(name)):
            parameter.requires_grad = False
            kept[names[parameter]] = parameter.detach().clone()
    return kept
