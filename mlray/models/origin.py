"""What a saved adapter says of itself, in `backbone.json`: on what it was trained, and for what."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mlray.config import ConfigError

WEIGHTS_FILE = "adapter_model.safetensors"
_FILE = "backbone.json"
_LANGUAGE_OBJECTIVES = ("masked", "causal", "denoising")
"""What the adapter of a language is trained for: its text alone."""
_READ_AS = {"distillation": "contrastive"}
"""Objective of a training -> the one whose models its adapter serves: vectors are vectors, whatever taught them."""


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from."""

    sha256: str
    """Digest of the backbone that it was trained on."""
    objective: str
    above_language: bool
    """Whether it was trained above the adapter of a language."""
    labels: list[str]
    """Of its head."""
    language_sha256: str | None = None
    """Digest of that one's weights."""
    prompt_completion: bool = False
    """Whether it was trained on prompts with what answers them; see `decoder.build`."""

    def write(self, folder: Path) -> None:
        """Puts it beside the weights."""
        (folder / _FILE).write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def of(cls, folder: Path) -> Origin:
        """Reads what was written.

        Raises:
            ConfigError: there is no adapter.
        """
        try:
            found = cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"no adapter at {folder}: {error}") from None
        if not (folder / WEIGHTS_FILE).is_file():  # peft would look for another format, or on a hub
            raise ConfigError(f"no adapter at {folder}: {WEIGHTS_FILE} is missing")
        return found


def check(folder: Path, found: str, objective: str, *, above_language: bool = False) -> None:
    """Refuses an adapter that was not trained for an objective, in this place, on the backbone with this digest.

    Raises:
        ConfigError: it says why.
    """
    told = Origin.of(folder)
    if objective not in {told.objective, _READ_AS.get(told.objective)}:
        raise ConfigError(f"the adapter at {folder} was trained for {told.objective}, not for {objective}")
    if told.above_language != above_language:
        advice = "empty adapter.language_path" if above_language else "name one in adapter.language_path"
        above = "above a language adapter" if told.above_language else "without a language adapter below"
        raise ConfigError(f"the adapter at {folder} was trained {above}; {advice}")
    check_backbone(folder, found)


def check_language(folder: Path, found: str) -> None:
    """Refuses what is no adapter of a language on the backbone with this digest.

    Raises:
        ConfigError: it says why.
    """
    told = Origin.of(folder)
    if told.objective not in _LANGUAGE_OBJECTIVES or told.above_language:
        above = " above a language adapter" if told.above_language else ""
        raise ConfigError(
            f"the adapter at {folder} was trained for {told.objective}{above}; adapter.language_path takes one that "
            f"was trained alone for {', '.join(_LANGUAGE_OBJECTIVES)}"
        )
    check_backbone(folder, found)


def language_digest(folder: Path) -> str:
    """sha256 of a language adapter's weights."""
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def check_language_below(folder: Path, language: Path) -> None:
    """Refuses to train an adapter on above another language adapter than it began above.

    Raises:
        ConfigError: it names the two.
    """
    expected, found = Origin.of(folder).language_sha256, language_digest(language)
    if expected != found:
        raise ConfigError(
            f"the adapter at {folder} was trained above the language adapter {str(expected)[:12]} and that at "
            f"{language} is {found[:12]}; put the former back, or start over with train.resume=false"
        )


def check_backbone(folder: Path, found: str) -> None:
    """Refuses an adapter of another backbone than the one with this digest.

    Raises:
        ConfigError: it names the two.
    """
    expected = Origin.of(folder).sha256
    if expected != found:
        raise ConfigError(
            f"the adapter at {folder} was trained on the backbone {expected[:12]} and this one is {found[:12]}; set "
            "model.path to the adapter's own"
        )
