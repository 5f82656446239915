"""The space of a sweep: keys of the configuration and the values that a trial may take.

`{choice: [4, 8]}`, `{uniform: [0.0, 0.3]}`, `{loguniform: [0.01, 0.2]}`, `{integer: [1, 8]}` (both ends included).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import tune

from mlray import configuration
from mlray.config import ConfigError, RunConfig

_DOMAINS: dict[str, Any] = {
    "uniform": tune.uniform,
    "loguniform": tune.loguniform,
    "integer": lambda low, high: tune.randint(low, high + 1),
}
_SHARED = ("run.", "storage.", "tokenizer.", "cluster.", "evaluation.", "release.", "sweep.")
"""Sections that all trials have in common."""
_OWN = {
    "corpus.alpha",
    "corpus.task_alpha",
    "corpus.batches",
    "corpus.curriculum",
    "corpus.curriculum_windows",
}
"""Of the corpus only the order is a trial's own: its documents, their tokens and the held-out rows are shared."""
_FIXED = {
    *("train.steps", "train.validate_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.log_every", "train.resume", "train.early_stopping", "train.patience"),
    *("objective.name", "objective.tasks", "model.family", "model.path"),
}
"""Settings without which trials could not be compared, or step by step."""


def build(config: RunConfig) -> dict[str, Any]:
    """Key -> domain of Ray Tune.

    Raises:
        ConfigError: a key is none of the configuration or not a trial's own, a range is empty, or a value is refused.
    """
    if not config.sweep.space:
        raise ConfigError("sweep.space is empty; name at least one, e.g. {adapter.rank: {choice: [4, 8]}}")
    return {key: _domain(key, told, config) for key, told in config.sweep.space.items()}


def _domain(key: str, told: Mapping[str, list[Any]], config: RunConfig) -> Any:
    _check_key(key)
    grid = config.sweep.algorithm == "grid"
    known = ["choice"] if grid else ["choice", *_DOMAINS]
    if len(told) != 1 or not told.keys() <= set(known):
        raise ConfigError(
            f"sweep.space.{key}={dict(told)}: {config.sweep.algorithm} takes one of {', '.join(known)}"
        )
    kind, values = next(iter(told.items()))
    if not values:
        raise ConfigError(f"sweep.space.{key}.{kind} holds no value")
    for value in values:
        configuration.change(config, {key: value})
    if kind == "choice":
        return tune.grid_search(values) if grid else tune.choice(values)
    if len(values) != 2 or values[0] >= values[1]:
        raise ConfigError(
            f"sweep.space.{key}.{kind}={values} is an empty range; it takes [low, high], low first"
        )
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"sweep.space.{key}.loguniform={values} must begin above 0")
    return _DOMAINS[kind](*values)


def _check_key(key: str) -> None:
    configuration.check_key(key)
    shared = key.startswith(_SHARED) or (key.startswith("corpus.") and key not in _OWN)
    if shared or key in _FIXED:
        raise ConfigError(f"sweep.space.{key}: it is the same for all trials")


def size(config: RunConfig) -> int | None:
    """Trials of the full grid; None where a range is no list of values."""
    count = 1
    for told in config.sweep.space.values():
        if "choice" not in told:
            return None
        count *= len(told["choice"])
    return count
