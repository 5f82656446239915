"""Adapters by `peft` (LoRA, DoRA, IA3) on any model of the table, alone or on top of a language adapter (MAD-X's idea).

`peft` changes the `transformers` model in place, so the packed forward stays what it is. A saved adapter names the
sha256 of the backbone that it was trained on, and is refused on another one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file

from mlray.config import Adapter, ConfigError, RunError
from mlray.models.backbone import Backbone, save_tokenizer

TASK, LANGUAGE = "task", "language"
_BACKBONE_FILE = "backbone.json"
_HEADS = ("classifier", "pooler", "head")
"""Modules of a task that no backbone brings: they are trained whole and saved beside the adapter."""
_NOT_BACKBONE = r"(lm_head|cls|classifier|head|decoder)(\..*)?|.*\.pooler(\..*)?"
"""An adapter of one task or language must fit the backbone under another head."""
_IA3_TARGETS = {
    "bert": (["key", "value", "intermediate.dense"], ["intermediate.dense"]),
    "xlm-roberta": (["key", "value", "intermediate.dense"], ["intermediate.dense"]),
    "modernbert": (["Wqkv", "mlp.Wo"], ["mlp.Wo"]),
    "m2m_100": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "mbart": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
}


def digest(model: Backbone) -> str:
    """sha256 over the names, shapes and values of a backbone's weights, without the heads of a task."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.model.base_model.named_parameters()):
        if not name.startswith("pooler."):
            found.update(f"{name}{tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def add(model: Backbone, config: Adapter, language: Path | None = None) -> Any:
    """Puts a fresh adapter into the model and freezes all else but the task's head; returns `peft`'s view of it.

    Args:
        model: as the table of objectives builds it.
        config: kind and sizes.
        language: folder of a trained language adapter that stays as it is below the new one.

    Raises:
        ConfigError: the language adapter belongs to another backbone, or is of another kind than LoRA and DoRA.
    """
    settings = _settings(model, config)
    if language is None:
        wrapped = peft.get_peft_model(model.model, settings, adapter_name=TASK)
    else:
        wrapped = _open(model, language, LANGUAGE)
        wrapped.add_adapter(TASK, settings)
        _activate(wrapped, [LANGUAGE, TASK])
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad = f".{TASK}." in name
    return wrapped


def load(model: Backbone, folder: Path, language: Path | None = None) -> Any:
    """Opens a trained adapter on its backbone, for use; `language` may be another one than in training.

    Raises:
        ConfigError: there is no adapter, or it belongs to another backbone.
    """
    if language is None:
        return _open(model, folder, TASK)
    found = digest(model)
    wrapped = _open(model, language, LANGUAGE)
    _check_backbone(folder, found)
    wrapped.load_adapter(str(folder), adapter_name=TASK)
    _activate(wrapped, [LANGUAGE, TASK])
    return wrapped.eval()


def export(
    wrapped: Any,
    backbone_digest: str,
    tokenizer: transformers.PreTrainedTokenizerFast,
    weights: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    """Writes the task's adapter so that plain `peft.PeftModel.from_pretrained` opens it.

    Args:
        wrapped: what `add` returned.
        backbone_digest: of the model before `add`.
        tokenizer: saved beside it.
        weights: whole trained tensors by the name that the packed model gives them.
        folder: where to.

    Raises:
        RunError: a tensor is missing or empty, as others have seen under ZeRO-3, none has moved, or the file read back
            does not hold them.
    """
    state = {f"base_model.{name}": tensor for name, tensor in weights.items()}
    wanted = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    lost = [name for name in wanted if name not in state or state[name].numel() == 0]
    if lost:
        raise RunError(f"the adapter's tensor {lost[0]} did not reach the checkpoint")
    wrapped.save_pretrained(
        str(folder),
        safe_serialization=True,
        selected_adapters=[TASK],
        state_dict=state,
        save_embedding_layers=False,
    )
    _verify({name: state[name] for name in wanted}, folder / TASK / "adapter_model.safetensors")
    inner = folder / TASK  # peft's place for an adapter that is not called "default"
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # a form for a model card that nobody has filled in
    names = wrapped.base_model.model.config.id2label
    body = {"sha256": backbone_digest, "labels": [names[number] for number in range(len(names))]}
    (folder / _BACKBONE_FILE).write_text(json.dumps(body, ensure_ascii=False) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder)


def _verify(trained: dict[str, torch.Tensor], path: Path) -> None:
    """Reads a saved adapter back. LoRA starts with zeros in B, IA3 with ones: what still is so has learnt nothing."""
    for start, mark in ((0.0, "lora_B"), (1.0, "ia3_l")):
        found = [tensor for name, tensor in trained.items() if mark in name]
        if found and all(bool((tensor == start).all()) for tensor in found):
            raise RunError(
                f"the adapter has learnt nothing: every {mark} is as it began; raise train.lr or train.steps"
            )
    written = sorted(map(_fingerprint, load_file(path).values()))
    if written != sorted(map(_fingerprint, trained.values())):
        raise RunError(
            f"the adapter that was written does not hold what was trained ({len(trained)} tensors)"
        )


def _fingerprint(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def labels_of(folder: Path) -> list[str]:
    """The labels that an adapter's head was trained on.

    Raises:
        ConfigError: there is no adapter.
    """
    return [str(label) for label in _read(folder)["labels"]]


def merge(wrapped: Any) -> Any:
    """The plain `transformers` model with the active adapters added into its weights."""
    return wrapped.merge_and_unload()


def _settings(model: Backbone, config: Adapter) -> Any:
    inner, family = model.model, model.model.config.model_type
    modules = {part for name, _ in inner.named_modules() for part in name.split(".")}
    transposed = family == "gpt2"  # its linear layers are `Conv1D`s of inputs x outputs
    saved = [name for name in _HEADS if name in modules] if "classifier" in modules else None
    if config.kind == "ia3":
        targets, feedforward = _IA3_TARGETS[family]
        return peft.IA3Config(
            target_modules=list(config.targets) or targets,
            feedforward_modules=feedforward,
            fan_in_fan_out=transposed,
            exclude_modules=_NOT_BACKBONE,
            modules_to_save=saved,
        )
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.kind == "dora",
        fan_in_fan_out=transposed,
        target_modules=list(config.targets) or "all-linear",
        exclude_modules=_NOT_BACKBONE,
        modules_to_save=saved,
    )


def _open(model: Backbone, folder: Path, name: str) -> Any:
    _check_backbone(folder, digest(model))
    return peft.PeftModel.from_pretrained(model.model, str(folder), adapter_name=name).eval()


def _check_backbone(folder: Path, found: str) -> None:
    expected = str(_read(folder)["sha256"])
    if expected != found:
        raise ConfigError(
            f"the adapter at {folder} was trained on the backbone {expected[:12]} and this one is {found[:12]}; set "
            "model.path to the adapter's own"
        )


def _read(folder: Path) -> dict[str, Any]:
    try:
        body: dict[str, Any] = json.loads((folder / _BACKBONE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no adapter at {folder}: {error}") from None
    return body


def _activate(wrapped: Any, names: list[str]) -> None:
    try:
        wrapped.base_model.set_adapter(names)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"these adapters cannot be stacked, only LoRA and DoRA can: {error}") from None
