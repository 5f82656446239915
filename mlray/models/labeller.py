"""Encoders with a head for labels of words or of texts, on packed rows; plain `transformers` opens what they export.

Shape letters: B rows, T tokens, N labelled positions, K labels, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mlray.config import ConfigError
from mlray.config import Model as ModelConfig
from mlray.models import backbone, loading
from mlray.models.backbone import PackedEncoder

log = logging.getLogger("mlray")

_Head = Callable[[Any, torch.Tensor], torch.Tensor]

_WORD_HEADS: dict[str, _Head] = {
    "bert": lambda model, hidden_NH: model.classifier(model.dropout(hidden_NH)),
    "xlm-roberta": lambda model, hidden_NH: model.classifier(model.dropout(hidden_NH)),
    "modernbert": lambda model, hidden_NH: model.classifier(model.drop(model.head(hidden_NH))),
}
_TEXT_HEADS: dict[str, _Head] = {
    "bert": lambda model, hidden_NH: model.classifier(model.dropout(model.bert.pooler(hidden_NH[:, None]))),
    "xlm-roberta": lambda model, hidden_NH: model.classifier(hidden_NH[:, None]),
    "modernbert": lambda model, hidden_NH: model.classifier(model.drop(model.head(hidden_NH))),
}


@dataclass(frozen=True)
class TokenDropout:
    """Reads a share of the tokens as `<mask>` (word dropout of Gal and Ghahramani 2016): what is hidden must be told
    from what stands around it, as an unseen name must."""

    share: float
    mask_id: int
    special_ids: tuple[int, ...]

    def __call__(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """A copy with `<mask>` in place of the tokens drawn."""
        special_BT = torch.isin(tokens_BT, torch.tensor(self.special_ids, device=tokens_BT.device))
        hidden_BT = (torch.rand(tokens_BT.shape, device=tokens_BT.device) < self.share) & ~special_BT
        return tokens_BT.masked_fill(hidden_BT, self.mask_id)


class Labeller(PackedEncoder):
    """An encoder and one of `transformers`' heads for labels; `dropout` hides tokens in training mode alone."""

    def __init__(
        self, model: transformers.PreTrainedModel, head: _Head, dropout: TokenDropout | None = None
    ) -> None:
        super().__init__(model)
        self._head = head
        self._dropout = dropout

    def forward(
        self,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor,
        offsets_BT: torch.Tensor,
        labelled_N: torch.Tensor,
        allowed_NK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (N, K) at the flat positions `labelled_N` (row x T + column); -inf where a label is not allowed."""
        if self._dropout and self.training:
            tokens_BT = self._dropout(tokens_BT)
        hidden_BTH = self.read(tokens_BT, segments_BT, offsets_BT)
        logits_NK = self._head(self.model, hidden_BTH.flatten(0, 1).index_select(0, labelled_N))
        return logits_NK if allowed_NK is None else logits_NK.masked_fill(~allowed_NK, -torch.inf)


FAMILIES = tuple(_WORD_HEADS)


def word_labels(folder: Path | str) -> list[str]:
    """The labels of a checkpoint that labels words. See `_labels`."""
    return _labels(folder, "ForTokenClassification")


def text_labels(folder: Path | str) -> list[str]:
    """The labels of a checkpoint that labels texts. See `_labels`."""
    return _labels(folder, "ForSequenceClassification")


def _labels(folder: Path | str, kind: str) -> list[str]:
    """The labels of a checkpoint, in the order of their numbers.

    Raises:
        ConfigError: there is no checkpoint, or it has another head.
    """
    found, labels = _head_of(folder)
    if not found.endswith(kind):  # its head would be random
        raise ConfigError(
            f"{folder} holds {found} and not a model {kind}: it was not fine-tuned for these labels"
        )
    return labels


def _head_of(folder: Path | str) -> tuple[str, list[str]]:
    """The class of `transformers` that a checkpoint names, and its labels in the order of their numbers.

    Raises:
        ConfigError: there is no checkpoint.
    """
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no checkpoint at {folder}: {str(error).splitlines()[0]}") from error
    found = (settings.architectures or ["a bare model"])[0]
    return found, [str(settings.id2label[number]) for number in range(len(settings.id2label))]


def build_words(
    config: ModelConfig, tokens: Any, folder: Path | str | None, labels: Sequence[str]
) -> Labeller:
    """A model that labels words: `AutoModelForTokenClassification`. See `_build`."""
    return _build(config, tokens, folder, labels, transformers.AutoModelForTokenClassification, _WORD_HEADS)


def build_texts(
    config: ModelConfig, tokens: Any, folder: Path | str | None, labels: Sequence[str]
) -> Labeller:
    """A model that labels texts: `AutoModelForSequenceClassification`. See `_build`."""
    model = _build(
        config, tokens, folder, labels, transformers.AutoModelForSequenceClassification, _TEXT_HEADS
    )
    if config.family == "modernbert":
        # A checkpoint's own may be the mean, and the head here reads the first token.
        model.model.config.classifier_pooling = "cls"
    return model


def _build(
    config: ModelConfig,
    tokens: Any,
    folder: Path | str | None,
    labels: Sequence[str],
    kind: Any,
    heads: dict[str, _Head],
) -> Labeller:
    """A fresh model, or the encoder at `folder` (also a hub name); a checkpoint's head stays if its labels are these.

    Raises:
        ConfigError: the checkpoint does not fit, or tokens cannot be hidden.
    """
    names: dict[str, dict[Any, Any]] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    if folder is None:
        settings = backbone.settings(config, tokens)
        settings.update(names)
        model = kind.from_config(settings)
    else:
        model = _load(config, tokens, folder, kind, names)
    return Labeller(model, heads[config.family], _dropout(config, tokens))


def _load(
    config: ModelConfig, tokens: Any, folder: Path | str, kind: Any, names: dict[str, dict[Any, Any]]
) -> Any:
    found, own = _head_of(folder)
    labels = list(names["id2label"].values())
    same = own == labels and found.endswith(kind.__name__.removeprefix("AutoModel"))
    if same or not found.endswith("Classification"):
        return loading.load(kind, config, tokens, folder, **names)
    model = loading.load(kind, config, tokens, folder)
    model.config.update(names)
    model.num_labels = len(labels)
    model.classifier = kind.from_config(model.config).classifier
    log.warning(
        "%s: its head (%s, %s) is left out, and a fresh one learns %s",
        config.path,
        found,
        _told(own),
        _told(labels),
    )
    return model


def _told(labels: list[str]) -> str:
    first = ", ".join(labels[:3])
    return f"{len(labels)} labels: {first}{', ...' if len(labels) > 3 else ''}"


def _dropout(config: ModelConfig, tokens: Any) -> TokenDropout | None:
    if not config.token_dropout:
        return None
    if tokens.mask_token_id is None:
        raise ConfigError("model.token_dropout needs a tokenizer with a mask token; leave it 0")
    return TokenDropout(config.token_dropout, tokens.mask_token_id, tuple(tokens.all_special_ids))
