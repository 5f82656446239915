"""What an objective refuses before it starts: another family, a corpus without what it learns, rows too long."""

from __future__ import annotations

from collections.abc import Iterable

from mlray import languages
from mlray.config import ConfigError, RunConfig
from mlray.config import Model as ModelConfig
from mlray.config import Objective as ObjectiveConfig
from mlray.corpus.sources import SourceFile
from mlray.objectives.table import OBJECTIVES


def check_family(objective: ObjectiveConfig, model: ModelConfig) -> None:
    """Refuses a family of models that the objective cannot train, or one without layers.

    Raises:
        ConfigError: it names the two, and the families that fit.
    """
    row = OBJECTIVES[objective.name]
    families = row.families
    if model.family not in families:
        raise ConfigError(
            f"model.family={model.family} does not fit objective.name={objective.name}; take one of "
            f"{', '.join(families)}"
        )
    if not model.num_layers and not model.path and (row.texts_in_row == 1 or model.family == "modernbert"):
        raise ConfigError(
            "model.num_layers=0 is for vectors of texts, by bert or xlm-roberta; "
            f"objective.name={objective.name} of {model.family} needs at least 1"
        )


def check_sources(objective: ObjectiveConfig, files: Iterable[SourceFile]) -> None:
    """Refuses a training set with nothing beside its texts where the objective learns that, and a task without one.

    Raises:
        ConfigError: it names the file, or the task.
    """
    unfed = set(objective.heads)
    for file in files:
        unfed.discard(languages.task(file.fallback))
        if OBJECTIVES[objective.name].paired and not (file.pair or file.pair_uri):
            raise ConfigError(
                f"objective.name={objective.name} learns what belongs to a text, and {file.uri} is read for texts "
                "alone; name its column in corpus.sources[].pair, or its file in pair_uri"
            )
    if objective.name == "multitask" and unfed:
        raise ConfigError(
            f"the task {min(unfed)!r} of objective.tasks has no source; set corpus.sources[].task of one to it"
        )


def check_positions(config: RunConfig, positions: int) -> None:
    """Refuses rows that the model cannot read.

    Raises:
        ConfigError: `corpus.sequence_length` is longer than the model's positions.
    """
    texts = OBJECTIVES[config.objective.name].texts_in_row
    if config.corpus.sequence_length // texts > positions:
        raise ConfigError(
            f"corpus.sequence_length={config.corpus.sequence_length} is longer than the model's {positions} positions"
            + f" for each of {texts} texts" * (texts > 1)
            + f"; lower it to {positions * texts} or raise model.max_positions"
        )
