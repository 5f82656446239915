"""Several adapters on one backbone: they come and go, and one forward pass reads each text with its own.

peft opens the adapters; its own mixed batches take whole rows, and go through the adapters one by one in each layer.
Here a layer multiplies all tokens with the matrices of all adapters that the pass needs, side by side, and each token
keeps what is its own adapter's: two products a layer, and texts of several adapters may share a row.
Shape letters: N texts, B rows, T tokens, K adapters, P of them in a pass, R rank (that of the largest), I inputs and O
outputs of a layer.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer

from mlray.config import ConfigError
from mlray.models import adapters, origin
from mlray.models.backbone import Backbone
from mlray.models.origin import Origin

_BASE = "__base__"
"""peft's name for no adapter."""


class Mixed:
    """Adapters by name on one model, for use; not safe for several threads."""

    def __init__(self, model: Backbone, own: Path | None = None, wrapped: Any = None) -> None:
        """
        Args:
            model: the backbone.
            own: the adapter that the model has anyway, for rows that ask for none, if it has one.
            wrapped: `peft`'s view of that.
        """
        self._model, self._wrapped = model, wrapped
        self._digest = Origin.of(own).sha256 if own else ""
        self._plain = adapters.TASK if own else _BASE
        self._shares = wrapped is None or all(
            name == self._plain and _is_lora(one) for name, one in wrapped.peft_config.items()
        )
        """Whether the model's own adapter can be one of several in a pass."""
        self._numbers: dict[str, int] = {}
        """Adapter -> its place in the matrices of every layer; 0 is what the model has anyway."""
        self._pass: tuple[torch.Tensor, torch.Tensor] | None = None
        """Of the pass that runs: the adapters that it needs, and 1 for the one of each token."""
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded, without the model's own."""
        known = self._wrapped.peft_config if self._wrapped else {}
        return [name for name in known if name not in {self._plain, adapters.LANGUAGE}]

    def load(self, name: str, folder: Path, objective: str) -> None:
        """Opens a trained adapter beside those that are there.

        Raises:
            ConfigError: the name is taken; there is no adapter, it belongs to another backbone or objective, lies above
                a language adapter, or is of a kind that cannot share a pass with others. What was loaded stays.
        """
        if name in {*self.names, self._plain, adapters.LANGUAGE}:
            raise ConfigError(f"there is an adapter {name} already")
        if not self._shares:
            raise ConfigError(
                "the model's own adapter is no LoRA, or lies above that of a language, and shares no pass with others"
            )
        self._digest = self._digest or adapters.digest(self._model)  # while it is bare
        origin.check(folder, self._digest, objective)
        config = peft.PeftConfig.from_pretrained(str(folder))
        if not _is_lora(config):
            raise ConfigError(
                f"the adapter at {folder} is no LoRA, and no other kind shares a pass with others"
            )
        config.inference_mode = True
        if self._wrapped is None:
            self._wrapped = peft.PeftModel(self._model.model, config, adapter_name=name)
        try:
            self._wrapped.load_adapter(str(folder), adapter_name=name)
            adapters.check_keys(self._wrapped, folder, name)
        except Exception as error:  # of safetensors, torch or peft
            if name in self.names:  # peft adds it before it reads its weights
                self.unload(name)
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the adapter at {folder} cannot be read: {type(error).__name__}") from error
        self._wrapped.eval()
        self._stack()

    def unload(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            ConfigError: it is not loaded.
        """
        if name not in self.names:
            raise ConfigError(f"the adapter {name} is not loaded")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Adapter .* was active")  # each pass names its own
            self._wrapped.delete_adapter(name)
        self._stack()

    @contextlib.contextmanager
    def reading(self, names_N: Sequence[str | None], texts_BT: torch.Tensor) -> Iterator[None]:
        """Inside it a forward pass reads text n with the adapter names_N[n]; None: as it would alone.

        Args:
            names_N: the adapter of each text.
            texts_BT: the text of each token; N for padding.

        Raises:
            ConfigError: one is not loaded.
        """
        absent = {name for name in names_N if name} - set(self.names)
        if absent:
            raise ConfigError(f"the adapter {min(absent)} is not loaded")
        if not self.names or (self._plain == _BASE and not any(names_N)):  # nothing is added to any text
            yield
            return
        numbers = [self._numbers[name] if name else 0 for name in names_N]
        numbers_N = torch.tensor(
            [*numbers, *numbers[:1]]
        )  # padding is read as the first text: nobody looks at it
        present_P, places_N = torch.unique(numbers_N, return_inverse=True)
        share_BTP = torch.nn.functional.one_hot(places_N, len(present_P))[texts_BT].float()
        device = next(self._model.parameters()).device
        self._pass = present_P.to(device), share_BTP[..., None].to(device)
        try:
            yield
        finally:
            self._pass = None

    def _stack(self) -> None:
        """Puts the matrices of all adapters of each layer side by side."""
        for hook in self._hooks:
            hook.remove()
        self._numbers = {name: number for number, name in enumerate(self.names, start=1)}
        self._hooks = []
        if not self.names:  # the model has what it has anyway by peft
            self._wrapped.base_model.enable_adapter_layers()
            return
        self._wrapped.base_model.disable_adapter_layers()
        layers = (one for one in self._wrapped.modules() if isinstance(one, LoraLayer))
        self._hooks = [layer.register_forward_hook(self._added(layer)) for layer in layers]

    def _added(
        self, layer: LoraLayer
    ) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
        """What adds to a layer's outputs what each token's adapter makes of its inputs."""
        known = [self._plain, *self._numbers]
        parts = {
            number: (
                layer.lora_A[name].weight.detach(),
                layer.lora_B[name].weight.detach() * layer.scaling[name],
            )
            for number, name in enumerate(known)
            if name in layer.lora_A
        }
        rank = max(len(down_RI) for down_RI, _ in parts.values())
        down_RI, up_OR = next(iter(parts.values()))
        down_KRI = down_RI.new_zeros(len(known), rank, down_RI.shape[1])
        up_KRO = up_OR.new_zeros(len(known), rank, len(up_OR))
        for number, (down_RI, up_OR) in parts.items():
            down_KRI[number, : len(down_RI)], up_KRO[number, : len(down_RI)] = down_RI, up_OR.T

        def add(_: Any, inputs: tuple[torch.Tensor, ...], output_BTO: torch.Tensor) -> torch.Tensor:
            if self._pass is None:
                return output_BTO
            present_P, share_BTP1 = self._pass
            down, up = down_KRI[present_P].flatten(0, 1), up_KRO[present_P].flatten(0, 1)
            middle = inputs[0].to(down.dtype) @ down.T  # (B, T, P * R)
            own = middle.view(*middle.shape[:-1], len(present_P), rank) * share_BTP1
            added_BTO: torch.Tensor = (own.flatten(-2) @ up).to(output_BTO.dtype)
            return output_BTO + added_BTO

        return add


def _is_lora(config: Any) -> bool:
    return config.peft_type == peft.PeftType.LORA and not config.use_dora
