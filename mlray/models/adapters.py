"""Adapters by `peft` (LoRA, DoRA, IA3) on any model of the table, alone or on top of a language adapter (MAD-X's idea).

`peft` changes the `transformers` model in place, so the packed forward stays what it is. A saved adapter names the
sha256 of the backbone that it was trained on, and is refused on another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlray.config import Adapter, ConfigError, RunError
from mlray.models import origin
from mlray.models.adapter_settings import settings
from mlray.models.backbone import Backbone, save_tokenizer

TASK, LANGUAGE = "task", "language"


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
        ConfigError: the targets are none of the model's, the checkpoint has no head for the objective and the adapter
            would freeze a random one, the language adapter belongs to another backbone or is none of a language, or
            the two are not both of LoRA and DoRA.
    """
    own = settings(model, config)
    if language is None:
        with _fitting():
            return peft.get_peft_model(model.model, own, adapter_name=TASK)
    origin.check_language(language, digest(model))
    wrapped = _open(model, language, LANGUAGE)
    with _fitting():
        wrapped.add_adapter(TASK, own)
        wrapped.base_model.set_adapter([LANGUAGE, TASK])
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad = f".{TASK}." in name
    return wrapped


def load(model: Backbone, folder: Path, language: Path | None = None, *, objective: str) -> Any:
    """Opens a trained adapter on its backbone, for use; `language` may be another one than in training.

    Raises:
        ConfigError: there is no adapter; it belongs to another backbone or another objective; it was trained above a
            language adapter and none is given, or the reverse; or `language` is none of a language.
    """
    found = digest(model)
    origin.check(folder, found, objective, above_language=language is not None)
    if language is None:
        return _open(model, folder, TASK)
    origin.check_language(language, found)
    wrapped = _open(model, language, LANGUAGE)
    with _fitting():
        wrapped.load_adapter(str(folder), adapter_name=TASK)
        wrapped.base_model.set_adapter([LANGUAGE, TASK])
    check_keys(wrapped, folder, TASK)
    return wrapped.eval()


def export(
    wrapped: Any,
    backbone_digest: str,
    objective: str,
    tokenizer: transformers.PreTrainedTokenizerFast,
    weights: dict[str, torch.Tensor],
    folder: Path,
    language_digest: str | None = None,
) -> None:
    """Writes the task's adapter so that plain `peft.PeftModel.from_pretrained` opens it.

    Args:
        wrapped: what `add` returned.
        backbone_digest: of the model before `add`.
        objective: that it was trained for.
        tokenizer: saved beside it.
        weights: whole trained tensors by the name that the packed model gives them.
        folder: where to.
        language_digest: of the language adapter below, see `origin.language_digest`.

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
    _verify({name: state[name] for name in wanted}, folder / TASK / origin.WEIGHTS_FILE)
    _lift(folder)
    own = wrapped.base_model.model.config
    told = origin.Origin(
        sha256=backbone_digest,
        objective=objective,
        above_language=LANGUAGE in wrapped.peft_config,
        language_sha256=language_digest,
        labels=[own.id2label[number] for number in range(len(own.id2label))],
        prompt_completion=getattr(own, "prompt_completion", False),
    )
    told.write(folder)
    save_tokenizer(tokenizer, folder)


def _lift(folder: Path) -> None:
    """Out of the place that `peft` has for an adapter that is not called "default"."""
    for path in (folder / TASK).iterdir():
        path.rename(folder / path.name)
    (folder / TASK).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # a form for a model card that nobody has filled in


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


def merge(wrapped: Any) -> Any:
    """The plain `transformers` model with the active adapters added into its weights."""
    return wrapped.merge_and_unload()


def _open(model: Backbone, folder: Path, name: str) -> Any:
    with _fitting():
        wrapped = peft.PeftModel.from_pretrained(model.model, str(folder), adapter_name=name).eval()
    check_keys(wrapped, folder, name)
    return wrapped


def check_keys(wrapped: Any, folder: Path, name: str) -> None:
    """Refuses an adapter of which `peft` has left out a tensor, or filled one in.

    Raises:
        ConfigError: it names one.
    """
    wanted = peft.get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    if odd := sorted(wanted.keys() ^ load_file(folder / origin.WEIGHTS_FILE).keys()):
        raise ConfigError(
            f"the adapter at {folder} and the model differ in {odd[0]}; an adapter fits models with a head as it was "
            "trained with, or all without one"
        )


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """What `peft` refuses, as one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Found missing adapter keys"
            )  # `check_keys` tells them, as an error
            yield
    except SafetensorError as error:
        raise ConfigError(f"the adapter's weights cannot be read: {error}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the adapter does not fit; see adapter.kind and adapter.targets (only LoRA and DoRA stack): {reason}"
        ) from None
