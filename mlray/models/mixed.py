"""Several adapters on one backbone: they come and go, and one forward pass reads each row with its own.

The passes are peft's (mixed batches of LoRA). Shape letters: B rows.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft

from mlray.config import ConfigError
from mlray.models import adapters
from mlray.models.backbone import Backbone

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
        self._digest = adapters.backbone_of(own) if own else ""
        self._plain = adapters.TASK if own else _BASE

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded, without the model's own."""
        known = self._wrapped.peft_config if self._wrapped else {}
        return [name for name in known if name != self._plain]

    def load(self, name: str, folder: Path, objective: str) -> None:
        """Opens a trained adapter beside those that are there.

        Raises:
            ConfigError: the name is taken; there is no adapter, it belongs to another backbone or objective, lies above
                a language adapter, or is of a kind that cannot share a pass with others. What was loaded stays.
        """
        if name in {*self.names, self._plain, adapters.LANGUAGE}:
            raise ConfigError(f"there is an adapter {name} already")
        self._digest = self._digest or adapters.digest(self._model)  # while it is bare
        adapters.check(folder, self._digest, objective)
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.peft_type != peft.PeftType.LORA or config.use_dora:
            raise ConfigError(
                f"the adapter at {folder} is no LoRA, and no other kind shares a pass with others"
            )
        config.inference_mode = True
        if self._wrapped is None:
            self._wrapped = peft.PeftModel(self._model.model, config, adapter_name=name)
        try:
            self._wrapped.load_adapter(str(folder), adapter_name=name)
        except Exception as error:  # of safetensors, torch or peft
            if name in self.names:  # peft adds it before it reads its weights
                self.unload(name)
            raise ConfigError(f"the adapter at {folder} cannot be read: {type(error).__name__}") from error
        self._wrapped.eval()

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

    @contextlib.contextmanager
    def rows(self, names_B: Sequence[str | None]) -> Iterator[None]:
        """Inside it a forward pass of the model reads row b with the adapter names_B[b]; None: as it would alone.

        Raises:
            ConfigError: one is not loaded.
        """
        absent = {name for name in names_B if name} - set(self.names)
        if absent:
            raise ConfigError(f"the adapter {min(absent)} is not loaded")
        if not self.names:
            yield
            return
        names = [name or self._plain for name in names_B]
        with self._wrapped.base_model._enable_peft_forward_hooks(adapter_names=names):
            yield
