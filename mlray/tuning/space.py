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
_SHARED = ("run.", "storage.", "tokenizer.", "cluster.", "evaluation.", "release.", "serving.", "sweep.")
"""Sections that all trials have in common."""
_OWN = {
    "corpus.alpha",
    "corpus.task_alpha",
    "corpus.batches",
    "corpus.curriculum",
    "corpus.curriculum_windows",
}
"""Of the corpus only the order is a trial's own: its documents, their tokens and the held-out rows are shared."""
_SHAPES = ("adapter.", "model.", "contrastive.learn_temperature", "train.freeze_")
_FIXED = {
    *("train.steps", "train.validate_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.log_every", "train.resume", "train.early_stopping", "train.patience"),
    *("objective.name", "objective.tasks", "model.family", "model.path"),
    *("adapter.path", "adapter.language_path"),
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
    _check_key(key, config)
    grid = config.sweep.algorithm == "grid"
    known = ["choice"] if grid else ["choice", *_DOMAINS]
    if len(told) != 1 or not told.keys() <= set(known):
        raise ConfigError(
            f"sweep.space.{key}={dict(told)}: {config.sweep.algorithm} takes one of {', '.join(known)}"
        )
    kind, values = next(iter(told.items()))
    if not values:
        raise ConfigError(f"sweep.space.{key}.{kind} holds no value")
    values = [_coerced(key, value, config) for value in values]
    if kind == "choice":
        return tune.grid_search(values) if grid else tune.choice(values)
    wanted = int if kind == "integer" else float
    if not all(type(value) is wanted for value in values):
        raise ConfigError(f"sweep.space.{key}.{kind}={values}: {kind} is for keys of type {wanted.__name__}")
    if len(values) != 2 or values[0] >= values[1]:
        raise ConfigError(
            f"sweep.space.{key}.{kind}={values} is an empty range; it takes [low, high], low first"
        )
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigError(f"sweep.space.{key}.loguniform={values} must begin above 0")
    return _DOMAINS[kind](*values)


def _coerced(key: str, value: Any, config: RunConfig) -> Any:
    """A value as the configuration takes it: `1e-4` of YAML is a text, and a number there."""
    changed = configuration.change(config, {key: value}).model_dump(mode="json")
    for part in key.split("."):
        changed = changed[part]
    return changed


def mutations(config: RunConfig, domains: Mapping[str, Any]) -> dict[str, Any]:
    """What PBT changes a clone by: a neighbour in a list, a fifth more or less of a number."""
    told = config.sweep.space
    return {
        key: [_coerced(key, value, config) for value in told[key]["choice"]]
        if "choice" in told[key]
        else domain
        for key, domain in domains.items()
    }


def clip(config: RunConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a clone, brought back into their ranges."""
    for key, told in config.sweep.space.items():
        if "choice" not in told:
            low, high = (_coerced(key, value, config) for value in next(iter(told.values())))
            values[key] = min(max(values[key], low), high)
    return values


def _check_key(key: str, config: RunConfig) -> None:
    configuration.check_key(key)
    if config.sweep.algorithm == "pbt" and key.startswith(_SHAPES) and "dropout" not in key:
        raise ConfigError(
            f"sweep.space.{key}: a clone has the tensors of its donor, so pbt cannot vary their shapes"
        )
    shared = key.startswith(_SHARED) or (key.startswith("corpus.") and key not in _OWN)
    if shared or key in _FIXED or "." not in key:
        raise ConfigError(f"sweep.space.{key}: it is the same for all trials")


def size(config: RunConfig) -> int | None:
    """Trials of the full grid; None where a range is no list of values."""
    count = 1
    for told in config.sweep.space.values():
        if "choice" not in told:
            return None
        count *= len(told["choice"])
    return count


def wanted(config: RunConfig) -> int:
    """How many trials a sweep is to have."""
    return (size(config) if config.sweep.algorithm == "grid" else None) or config.sweep.num_trials
