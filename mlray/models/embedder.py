"""Encoders that make one vector of each text, on packed rows; `transformers` and `sentence-transformers` open them.

Shape letters: B rows, T tokens, N texts, H hidden size.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from mlray import access, storage
from mlray.config import ConfigError, Contrastive, Distillation, Storage
from mlray.config import Model as ModelConfig
from mlray.models import backbone, loading, tokenizer
from mlray.models.backbone import PackedEncoder

_LARGEST_SCALE = math.log(100.0)
"""Of a learnt temperature (Radford et al. 2021)."""
_POOLING_FILE = "1_Pooling/config.json"
_POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
"""Pooling -> its name in that file, after `pooling_mode_`."""


class Embedder(PackedEncoder):
    """An encoder whose vectors have the length 1/sqrt(temperature), so that their products are the loss's logits."""

    def __init__(self, model: transformers.PreTrainedModel, config: Contrastive) -> None:
        super().__init__(model)
        width = int(model.config.hidden_size)
        if max(config.dimensions, default=0) >= width:
            raise ConfigError(
                f"contrastive.dimensions={list(config.dimensions)}: the vector has {width}, a prefix has less"
            )
        self.pooling = config.pooling
        self.learns_scale = config.learn_temperature
        self.log_scale_1 = torch.nn.Parameter(
            torch.tensor([-math.log(config.temperature)]), requires_grad=config.learn_temperature
        )

    def forward(
        self,
        tokens_BT: torch.Tensor,
        segments_BT: torch.Tensor,
        offsets_BT: torch.Tensor,
        texts_BT: torch.Tensor,
        first_N: torch.Tensor,
        last_N: torch.Tensor,
    ) -> torch.Tensor:
        """Vectors (N, H) in fp32.

        Args:
            tokens_BT: packed texts; `segments_BT` and `offsets_BT` as `PackedEncoder.read` takes them.
            texts_BT: the text that a token belongs to, N for padding.
            first_N: flat position (row x T + column) of each text's first token, and `last_N` of its last.
        """
        hidden_RH = self.read(tokens_BT, segments_BT, offsets_BT).flatten(0, 1).float()
        vectors_NH = torch.nn.functional.normalize(self._pool(hidden_RH, texts_BT, first_N, last_N), dim=-1)
        scale_1 = self.log_scale_1.float()
        return (
            vectors_NH * (0.5 * (scale_1.clamp(max=_LARGEST_SCALE) if self.learns_scale else scale_1)).exp()
        )

    def _pool(
        self, hidden_RH: torch.Tensor, texts_BT: torch.Tensor, first_N: torch.Tensor, last_N: torch.Tensor
    ) -> torch.Tensor:
        if self.pooling != "mean":
            return hidden_RH.index_select(0, first_N if self.pooling == "cls" else last_N)
        sums_MH = hidden_RH.new_zeros(len(first_N) + 1, hidden_RH.shape[1])
        # The length of the vector is set afterwards: the sum will do for the mean.
        return sums_MH.index_add(0, texts_BT.flatten(), hidden_RH)[:-1]


def build(config: ModelConfig, contrastive: Contrastive, tokens: Any, folder: Path | str | None) -> Embedder:
    """A fresh encoder, or the one at `folder` (also a hub name), without the head that a task gave it.

    Raises:
        ConfigError: the checkpoint does not fit.
    """
    plain = {} if config.family == "modernbert" else {"add_pooling_layer": False}
    if folder is None:
        return Embedder(
            transformers.AutoModel.from_config(backbone.settings(config, tokens), **plain), contrastive
        )
    kind = SimpleNamespace(from_pretrained=functools.partial(transformers.AutoModel.from_pretrained, **plain))
    return Embedder(loading.load(kind, config, tokens, folder), contrastive)


class Distiller(Embedder):
    """A student beside its teacher, whose weights are none of its own and stay what they are."""

    def __init__(self, model: transformers.PreTrainedModel, config: Contrastive, teacher: Embedder) -> None:
        super().__init__(model, config)
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple: no module of this one

    @property
    def teacher(self) -> Embedder:
        """The one that is learnt from."""
        return self._teacher[0]

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Unit vectors (3, P, W) of P first halves, second halves and the teacher's texts, filled up with zeros.

        Args:
            inputs: those of `Embedder.forward`, and the teacher's with `teacher_` before each name.
        """
        own = {name: tensor for name, tensor in inputs.items() if not name.startswith("teacher_")}
        other = {
            name.removeprefix("teacher_"): tensor
            for name, tensor in inputs.items()
            if name.startswith("teacher_")
        }
        student_NH = super().forward(**own)
        student_2PH = student_NH.reshape(2, -1, student_NH.shape[-1])
        teacher = self.teacher.to(student_2PH.device)
        with torch.no_grad():
            taught_1PH = teacher(**other)[None]
        width = max(student_2PH.shape[-1], taught_1PH.shape[-1])
        parts = [
            torch.nn.functional.pad(torch.nn.functional.normalize(part, dim=-1), (0, width - part.shape[-1]))
            for part in (student_2PH, taught_1PH)
        ]
        return torch.cat(parts)


def build_distiller(
    config: ModelConfig,
    contrastive: Contrastive,
    distillation: Distillation,
    tokens: Any,
    folder: Path | str | None,
    teacher: Path,
) -> Distiller:
    """A student, fresh or from `folder`, beside the encoder at `teacher`.

    Raises:
        ConfigError: a checkpoint does not fit, or the teacher's vectors have another size and its loss needs the same.
    """
    student = build(config, contrastive, tokens, folder)
    known = checkpoint_of(ModelConfig(), str(teacher), Storage())
    pooling = {"pooling": pooling_of(teacher) or "mean"}
    taught = build(known, contrastive.model_copy(update=pooling), tokenizer.load(teacher), teacher)
    sizes = [int(one.model.config.hidden_size) for one in (taught, student)]
    if distillation.loss == "mse" and sizes[0] != sizes[1]:
        raise ConfigError(
            f"the teacher {distillation.teacher} makes vectors of {sizes[0]} dimensions and the student of {sizes[1]}; "
            "set model.hidden_size to the teacher's, or distillation.loss=similarity"
        )
    return Distiller(student.model, contrastive, taught)


def checkpoint_of(config: ModelConfig, uri: str, settings: Storage) -> ModelConfig:
    """The section, changed to the checkpoint in a folder or at an `s3://` prefix, and to the family that it names.

    Raises:
        ConfigError: there is none, or it is no encoder of ours.
    """
    try:
        found = str(json.loads(storage.read_bytes(storage.join(uri, "config.json"), settings))["model_type"])
    except (access.StorageError, ValueError, KeyError):
        raise ConfigError(
            f"{uri} holds no checkpoint of `transformers` (config.json); name its weights"
        ) from None
    if found not in backbone.FAMILIES:
        raise ConfigError(f"{uri} is a {found} checkpoint and no encoder of {', '.join(backbone.FAMILIES)}")
    return config.model_copy(update={"family": found, "path": uri})


def export(model: Embedder, tokens: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes what `backbone.export` does, and beside it what `SentenceTransformer(folder)` reads.

    Raises:
        OSError: a file could not be written.
    """
    kept = {name: tensor for name, tensor in weights.items() if name != "log_scale_1"}
    backbone.export(model, tokens, kept, folder)
    width = int(model.model.config.hidden_size)
    files = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "sentence_bert_config.json": {"max_seq_length": backbone.positions(model), "do_lower_case": False},
        _POOLING_FILE: {
            "word_embedding_dimension": width,
            **{f"pooling_mode_{name}": model.pooling == pooling for pooling, name in _POOLINGS.items()},
        },
    }
    for name, body in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def pooling_of(folder: Path | str) -> str | None:
    """The pooling that a folder of `sentence-transformers` names, old or new; None if it is no such folder.

    Raises:
        ConfigError: it pools otherwise, or has a module beyond pooling and normalisation.
    """
    path, modules = Path(folder) / _POOLING_FILE, Path(folder) / "modules.json"
    if not path.is_file():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    named = [pooling for pooling, name in _POOLINGS.items() if told.get(f"pooling_mode_{name}")]
    if "pooling_mode" in told:  # newer: mean, cls or lasttoken
        named = [{"lasttoken": "last"}.get(told["pooling_mode"], told["pooling_mode"])]
    if len(named) != 1 or named[0] not in _POOLINGS:
        raise ConfigError(
            f"{path} pools by {told.get('pooling_mode', named)}; take one of {', '.join(_POOLINGS)}"
        )
    kinds = [str(one["type"]).rpartition(".")[-1] for one in json.loads(modules.read_text(encoding="utf-8"))]
    extra = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if extra:
        raise ConfigError(f"{modules} has a module {extra[0]}, which no encoder of ours has")
    return named[0]


def check_pooling(model: Any, folder: Path | str) -> None:
    """Refuses an adapter of an encoder that would be read otherwise than it is trained: by its backbone's own pooling.

    Raises:
        ConfigError: the folder of the backbone names another.
    """
    if isinstance(model, Embedder) and (own := pooling_of(folder)) not in {None, model.pooling}:
        raise ConfigError(
            f"contrastive.pooling={model.pooling}, and an adapter is read as its backbone, whose 1_Pooling says {own}; "
            f"set contrastive.pooling={own}"
        )
