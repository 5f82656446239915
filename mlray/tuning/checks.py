"""What a sweep refuses before it costs anything."""

from __future__ import annotations

import importlib.util

from mlray import configuration, storage
from mlray.config import ConfigError, RunConfig
from mlray.evaluation import evaluate
from mlray.training import placement

DRIVER_CPUS = 0.2
"""Of a trial's driver, which waits for its workers."""
_MEASURES = ("contrastive.", "distillation.", "objective.")
"""What the loss itself is made of."""
_FREE = {"cluster", "storage", "evaluation", "release", "serving"}
"""Sections by which no trial differs from those before a resume."""


def settings(config: RunConfig) -> None:
    """Refuses what would show only when the trials have been paid for.

    Raises:
        ConfigError: the winner could not be judged, trials would end by themselves, or a logger is not installed.
    """
    if not config.evaluation.sources:
        raise ConfigError(
            "evaluation.sources is empty, and the winner of a sweep is judged on them; name test sets"
        )
    evaluate.check(config)
    if config.train.early_stopping is not None:
        raise ConfigError(
            "train.early_stopping ends a trial before its last step, where trials are compared; "
            "sweep.early_stopping stops those that fall behind"
        )
    measures = [key for key in config.sweep.space if key.startswith(_MEASURES)]
    if config.sweep.metric == "loss" and measures:
        raise ConfigError(
            f"sweep.metric=loss is another measure with every {measures[0]}; compare trials by accuracy, or leave "
            "the key out of sweep.space"
        )
    if config.sweep.mlflow_uri is not None and importlib.util.find_spec("mlflow") is None:
        raise ConfigError("sweep.mlflow_uri needs MLflow: pip install 'mlray[mlflow]'")


def begun(config: RunConfig, root: str, *, resume: bool) -> None:
    """Refuses to begin where a sweep lies, and to go on with other settings than it was begun with.

    Raises:
        ConfigError: it names the setting.
    """
    place = storage.join(root, "config.yaml")
    if not storage.exists(place, config.storage):
        if resume:
            raise ConfigError(f"{root} holds no sweep to resume")
        return
    if not resume:
        raise ConfigError(f"{root} holds a sweep; --resume goes on with it, another run.name begins one")
    before = configuration.parse(storage.read_bytes(place, config.storage).decode(), place).model_dump(
        mode="json"
    )
    now = config.model_dump(mode="json")
    for section in sorted(now.keys() - _FREE):
        changed = [key for key, value in now[section].items() if before[section][key] != value]
        if changed:
            raise ConfigError(
                f"{section}.{changed[0]} is not what {root} was begun with; set it back, or begin with another run.name"
            )


def room(config: RunConfig, count: int, drivers: int) -> None:
    """Refuses trials that would wait for each other for ever.

    Args:
        config: of a trial.
        count: trials that are to run side by side.
        drivers: that are started, each of which waits for its trial's workers.

    Raises:
        ConfigError: the cluster cannot place one, or not so many at a time.
    """
    placement.check(config)
    settings, cluster = config.sweep, config.cluster
    if settings.algorithm == "pbt" and not 2 <= settings.num_trials <= settings.max_concurrent:
        raise ConfigError(
            f"sweep.algorithm=pbt runs its whole population side by side: sweep.num_trials={settings.num_trials} must "
            f"be 2 or more, and sweep.max_concurrent={settings.max_concurrent} as many"
        )
    if settings.grace_steps > config.train.steps:
        raise ConfigError(
            f"sweep.grace_steps={settings.grace_steps} lies behind train.steps={config.train.steps}"
        )
    together = cluster.model_copy(update={"num_workers": cluster.num_workers * count})
    one, needed = placement.wanted_cpus(config), DRIVER_CPUS * drivers + placement.wanted_cpus(config) * count
    try:
        placement.check(config.model_copy(update={"cluster": together}))  # waits for nodes that are to come
        fits = placement.cpus() + 1e-9 >= needed
    except ConfigError:
        fits = False
    if not fits:
        raise ConfigError(
            f"sweep.max_concurrent={drivers} trials cannot be placed: each needs {one + DRIVER_CPUS:g} CPU with its "
            f"driver and input pipeline and {cluster.num_workers * cluster.gpus_per_worker:g} GPU, and the cluster "
            f"offers {placement.cpus():g} CPU; lower sweep.max_concurrent, cluster.num_workers or "
            "cluster.cpus_per_worker"
        )
