"""What a bundle holds beside its encoder: a recommender of sessions, a translator.

    recommender/    weights, catalogue (as a tokenizer) and configuration of a run of `next_item`
    translator/     the same of a run of `translation`

Their evaluations stand in the bundle's report and predictions, so that the gate judges them language by language, and
they come and go with the bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlray import configuration, storage
from mlray.config import ConfigError, Evaluation, RunConfig
from mlray.evaluation.report import Report
from mlray.models.generation import Writer
from mlray.objectives.recommending import NextItem
from mlray.release.registry import Registry

_ENDS = 4
"""Tokens of a translation that are no text, and some to spare."""


class Translator:
    """A translator that writes as it was judged."""

    def __init__(self, writer: Writer, settings: Evaluation) -> None:
        self._writer, self._settings = writer, settings

    def translate(self, texts: list[str], source: str, target: str) -> list[str]:
        """Translations in the order of `texts`.

        Raises:
            ConfigError: the model has no token for one of the languages.
        """
        return self._writer.translate(texts, source, target, self._settings)

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self._writer.encoder.encode(texts)]

    @property
    def room(self) -> int:
        """Tokens of a text that is surely read and written to its end: a translation may be half as long again."""
        written = min(self._settings.max_new_tokens, self._writer.room)
        return min(self._writer.room, max(2 * (written - _ENDS) // 3, 1))


@dataclass(frozen=True)
class Kind:
    """What a companion is made of."""

    objective: str
    opened: Callable[[RunConfig, Path, str], Any]
    """(configuration of the run, folder of the weights, device) -> model."""


KINDS = {
    "recommender": Kind("next_item", lambda config, folder, device: NextItem(config, folder, device=device)),
    "translator": Kind(
        "translation",
        lambda config, folder, device: Translator(Writer(folder, device=device), config.evaluation),
    ),
}


def add(stage: Path, name: str, config: RunConfig, weights: str, judged: Path) -> None:
    """Puts a companion into the bundle that is being made.

    Args:
        stage: the bundle; its `report.json` and `predictions.jsonl` are rewritten.
        name: of `KINDS`.
        config: of the run.
        weights: the folder of the run's weights.
        judged: folder with the run's own report and predictions.

    Raises:
        ConfigError: the run is of another objective, or an adapter without its backbone.
        StorageError: the weights cannot be read.
    """
    wanted = KINDS[name].objective
    if config.objective.name != wanted or config.adapter.kind != "none":
        raise ConfigError(
            f"--{name} takes a whole model of objective.name={wanted}, and {config.run.name} is "
            f"{config.objective.name} with adapter.kind={config.adapter.kind}"
        )
    target = stage / name
    with storage.local_copy(weights, config.storage) as folder:
        storage.upload(folder, str(target), config.storage)
    (target / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    _opened(target, name)  # what could not be served is told here
    ours, theirs = (
        Report.from_json((one / "report.json").read_text(encoding="utf-8")) for one in (stage, judged)
    )
    ours.cells.update(theirs.cells)
    (stage / "report.json").write_text(ours.to_json(), encoding="utf-8")
    with (stage / "predictions.jsonl").open("a", encoding="utf-8") as rows:
        rows.write((judged / "predictions.jsonl").read_text(encoding="utf-8"))


def open_companion(registry: Registry, bundle: str, name: str, device: str = "cpu") -> Any:
    """A companion (`KINDS`) of a bundle; None if it has none of this name.

    Raises:
        ConfigError: there is no such bundle, or it cannot be opened.
    """
    if not registry.about("bundles", bundle).get(name):
        return None
    with storage.local_copy(
        storage.join(registry.place("bundles", bundle), name), registry.settings
    ) as folder:
        return _opened(folder, name, device)


def _opened(folder: Path, name: str, device: str = "cpu") -> Any:
    place = folder / "config.yaml"
    config = configuration.parse(place.read_text(encoding="utf-8"), str(place))
    return KINDS[name].opened(config, folder, device)
