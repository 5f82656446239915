"""What a bundle holds beside its encoder: a recommender of sessions, a translator, a writer of answers.

    recommender/    weights, catalogue (as a tokenizer) and configuration of a run of `next_item`;
                    in adapters/<market>/ adapters of single markets
    translator/     the same of a run of `translation`
    writer/         the same of a run of `causal` that has learnt `question, passage -> answer`

A recommender or a translator may also be what a bundle is (`alone`): then its weights are those of the bundle, and the
adapters of its markets lie beside them. Their evaluations stand in the bundle's report and predictions, so that the
gate judges them language by language, and they come and go with the bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlray import configuration, storage
from mlray.config import ConfigError, Evaluation, RunConfig
from mlray.models.generation import Continuer, Writer
from mlray.objectives import causal
from mlray.objectives.recommending import NextItem
from mlray.release import evaluations, markets
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


class Composer:
    """Writes an answer from a passage, as it was judged."""

    def __init__(self, continuer: Continuer, settings: Evaluation) -> None:
        self._continuer, self._settings = continuer, settings

    def write(self, prompts: list[str]) -> list[str]:
        """The answer to each prompt, in order."""
        return [text.strip() for text in self._continuer.write(prompts, self._settings)]

    @property
    def longest(self) -> int:
        """Tokens of an answer, at most."""
        return self._settings.max_new_tokens

    def prompt(self, question: str, passage: str) -> tuple[str, int] | None:
        """What is read, and its tokens; None: more than is read whole.

        The question in one line, so that nobody writes a passage of his own, and the passage below it: as
        `corpus.sources[].text: [question, passage]` reads in training.
        """
        text = f"{' '.join(question.split())}\n{passage}"
        (tokens,) = self._continuer.encoder.encode([text])
        return (text, len(tokens)) if len(tokens) <= self._continuer.room(self._settings) else None


@dataclass(frozen=True)
class Kind:
    """What a companion is made of."""

    objective: str
    opened: Callable[[RunConfig, Path, str], Any]
    """(configuration of the run, folder of the weights, device) -> model."""
    alone: bool
    """Whether it answers anything without an encoder."""


KINDS = {
    "recommender": Kind(
        "next_item", lambda config, folder, device: NextItem(config, folder, device=device), alone=True
    ),
    "translator": Kind(
        "translation",
        lambda config, folder, device: Translator(Writer(folder, device=device), config.evaluation),
        alone=True,
    ),
    "writer": Kind(
        "causal",
        # `add` takes none without pairs, whether or not its checkpoint tells of them.
        lambda config, folder, device: Composer(
            Continuer(folder, device=device, paired=True), config.evaluation
        ),
        alone=False,
    ),
}


def add(stage: Path, name: str, config: RunConfig, weights: Path, judged: Path) -> None:
    """Puts a companion into the bundle that is being made.

    Args:
        stage: the bundle; its evaluation is rewritten.
        name: of `KINDS`.
        config: of the run.
        weights: folder of the run's weights.
        judged: folder with the run's own report and predictions.

    Raises:
        ConfigError: the run is of another objective, that of the bundle itself, or an adapter without its backbone.
    """
    wanted = KINDS[name].objective
    if config.objective.name != wanted or config.adapter.kind != "none":
        raise ConfigError(
            f"--{name} takes a whole model of objective.name={wanted}, and {config.run.name} is "
            f"{config.objective.name} with adapter.kind={config.adapter.kind}"
        )
    if configuration.load(stage / "config.yaml").objective.name == wanted:
        raise ConfigError(
            f"--{name}: the bundle's own model is one of objective.name={wanted}, and is served as that"
        )
    if name == "writer" and not causal.paired(config.corpus.sources):
        raise ConfigError(
            f"--writer takes a run on pairs (corpus.sources[].pair), and {config.run.name} has none"
        )
    target = stage / name
    shutil.copytree(weights, target)
    (target / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    _opened(target, name)  # what could not be served is told here
    evaluations.add(stage, judged)


def alone(about: Mapping[str, Any]) -> str | None:
    """The companion that a bundle is, by what it says of itself; None: an encoder, or what is not served."""
    if about.get("adapter", "none") != "none":
        return None
    return next(
        (name for name, kind in KINDS.items() if kind.alone and kind.objective == about["objective"]), None
    )


def open_companion(registry: Registry, bundle: str, name: str, device: str = "cpu") -> Any:
    """A companion (`KINDS`) of a bundle; None if it has none of this name.

    Raises:
        ConfigError: there is no such bundle, or it cannot be opened.
    """
    about, place = registry.about("bundles", bundle), registry.place("bundles", bundle)
    if alone(about) != name:
        if not about.get(name):
            return None
        place = storage.join(place, name)
    with storage.local_copy(place, registry.settings) as folder:
        return _opened(folder, name, device)


def add_market(stage: Path, market: str, adapter: Path, judged: Path) -> None:
    """Puts the adapter of a market below the bundle's recommender, whose figures there are then those of the adapter.

    Args:
        stage: as in `add`, with its recommender.
        market: that it was trained for.
        adapter: its folder.
        judged: folder with its own report and predictions.

    Raises:
        ConfigError: there is no recommender, it does not know the market, the adapter does not fit, or was not judged.
    """
    own = configuration.load(stage / "config.yaml").objective.name == KINDS["recommender"].objective
    target = stage if own else stage / "recommender"
    if not target.is_dir():
        raise ConfigError("--recommender-adapter needs --recommender, the model below it")
    known = _opened(target, "recommender")
    known.check([market])
    known.load(market, adapter)
    evaluations.take_over(stage, market, judged)
    shutil.copytree(adapter, target / markets.FOLDER / market)


def _opened(folder: Path, name: str, device: str = "cpu") -> Any:
    """The model of a folder, in which the weights lie, or in `weights`, if it is a whole bundle."""
    weights = folder / "weights" if (folder / "weights").is_dir() else folder
    found = KINDS[name].opened(configuration.load(folder / "config.yaml"), weights, device)
    adapted = folder / markets.FOLDER
    for place in sorted(adapted.iterdir()) if name == "recommender" and adapted.is_dir() else ():
        found.load(place.name, place)
    return found
