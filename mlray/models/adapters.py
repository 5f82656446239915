"""Adapters by `peft` (LoRA, DoRA, IA3) on any model of the table, alone or on top of a language adapter (MAD-X's idea).

`peft` changes the `transformers` model in place, so the packed forward stays what it is. A saved adapter names the
sha256 of the backbone that it was trained on, and is refused on another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from mlray.config import Adapter, ConfigError, RunError
from mlray.models.backbone import Backbone, save_tokenizer

TASK, LANGUAGE = "task", "language"
_BACKBONE_FILE, _WEIGHTS_FILE = "backbone.json", "adapter_model.safetensors"
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
"""Keys and values, and the second matrix of the feed-forward, whose input is scaled (Liu et al. 2022)."""
_READ_AS = {"distillation": "contrastive"}
"""Objective of a training -> the one whose models its adapter serves: vectors are vectors, whatever taught them."""


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
        ConfigError: the targets are none of the model's, the language adapter belongs to another backbone, or the two
            are not both of LoRA and DoRA.
    """
    if language is None:
        with _fitting():
            return peft.get_peft_model(model.model, _settings(model, config), adapter_name=TASK)
    wrapped = _open(model, language, LANGUAGE)
    with _fitting():
        wrapped.add_adapter(TASK, _settings(model, config))
        wrapped.base_model.set_adapter([LANGUAGE, TASK])
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad = f".{TASK}." in name
    return wrapped


def load(model: Backbone, folder: Path, language: Path | None = None, *, objective: str) -> Any:
    """Opens a trained adapter on its backbone, for use; `language` may be another one than in training.

    Raises:
        ConfigError: there is no adapter; it belongs to another backbone or another objective; or it was trained above
            a language adapter and none is given, or the reverse.
    """
    _check_use(folder, objective, above_language=language is not None)
    if language is None:
        return _open(model, folder, TASK)
    found = digest(model)
    wrapped = _open(model, language, LANGUAGE)
    check_backbone(folder, found)
    with _fitting():
        wrapped.load_adapter(str(folder), adapter_name=TASK)
        wrapped.base_model.set_adapter([LANGUAGE, TASK])
    return wrapped.eval()


def export(
    wrapped: Any,
    backbone_digest: str,
    objective: str,
    tokenizer: transformers.PreTrainedTokenizerFast,
    weights: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    """Writes the task's adapter so that plain `peft.PeftModel.from_pretrained` opens it.

    Args:
        wrapped: what `add` returned.
        backbone_digest: of the model before `add`.
        objective: that it was trained for.
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
    _verify({name: state[name] for name in wanted}, folder / TASK / _WEIGHTS_FILE)
    inner = folder / TASK  # peft's place for an adapter that is not called "default"
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # a form for a model card that nobody has filled in
    settings = wrapped.base_model.model.config
    body = {
        "sha256": backbone_digest,
        "objective": objective,
        "above_language": LANGUAGE in wrapped.peft_config,
        "labels": [settings.id2label[number] for number in range(len(settings.id2label))],
        "prompt_completion": getattr(settings, "prompt_completion", False),
    }
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


def is_paired(folder: Path) -> bool:
    """Whether an adapter was trained on prompts with what answers them; see `decoder.build`.

    Raises:
        ConfigError: there is no adapter.
    """
    return bool(_read(folder).get("prompt_completion", False))


def merge(wrapped: Any) -> Any:
    """The plain `transformers` model with the active adapters added into its weights."""
    return wrapped.merge_and_unload()


def _settings(model: Backbone, config: Adapter) -> Any:
    inner, family = model.model, model.model.config.model_type
    if not any(isinstance(part, torch.nn.Linear | Conv1D) for part in inner.modules()):
        raise ConfigError(
            f"adapter.kind={config.kind} wraps linear layers and the model has none; train it whole, with "
            "adapter.kind=none"
        )
    modules = {part for name, _ in inner.named_modules() for part in name.split(".")}
    transposed = family == "gpt2"  # its linear layers are `Conv1D`s of inputs x outputs
    saved = [name for name in _HEADS if name in modules] if "classifier" in modules else None
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


def _open(model: Backbone, folder: Path, name: str) -> Any:
    check_backbone(folder, digest(model))
    return peft.PeftModel.from_pretrained(model.model, str(folder), adapter_name=name).eval()


def check(folder: Path, found: str, objective: str) -> None:
    """Refuses an adapter that was not trained for an objective on the bare backbone with this digest.

    Raises:
        ConfigError: it says why.
    """
    _check_use(folder, objective, above_language=False)
    check_backbone(folder, found)


def _check_use(folder: Path, objective: str, *, above_language: bool) -> None:
    told = _read(folder)
    if not (folder / _WEIGHTS_FILE).is_file():  # peft would look for another format, or on a hub
        raise ConfigError(f"no adapter at {folder}: {_WEIGHTS_FILE} is missing")
    if objective not in {told["objective"], _READ_AS.get(told["objective"])}:
        raise ConfigError(f"the adapter at {folder} was trained for {told['objective']}, not for {objective}")
    if told["above_language"] != above_language:
        advice = "empty adapter.language_path" if above_language else "name one in adapter.language_path"
        above = "above a language adapter" if told["above_language"] else "without a language adapter below"
        raise ConfigError(f"the adapter at {folder} was trained {above}; {advice}")


def backbone_of(folder: Path) -> str:
    """The digest of the backbone that an adapter was trained on.

    Raises:
        ConfigError: there is no adapter.
    """
    return str(_read(folder)["sha256"])


def check_backbone(folder: Path, found: str) -> None:
    """Refuses an adapter of another backbone than the one with this digest.

    Raises:
        ConfigError: it names the two.
    """
    expected = backbone_of(folder)
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


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """What `peft` refuses, as one line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the adapter does not fit; see adapter.kind and adapter.targets (only LoRA and DoRA stack): {reason}"
        ) from None
