"""What a sweep refuses before it costs anything."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import secrets
from collections.abc import Iterator

from mlray import configuration, storage
from mlray.config import ConfigError, RunConfig
from mlray.evaluation import evaluate
from mlray.training import placement

DRIVER_CPUS = 0.2
"""Of a trial's driver, which waits for its workers."""
_MEASURES = ("contrastive.", "distillation.", "objective.")
"""What the loss itself is made of."""
_QUESTIONS = {
    *("objective.mask_rate", "objective.whole_word", "objective.noise_rate", "objective.span_length"),
    *("objective.permute_sentences", "recommendation.candidates"),
}
"""What a validation asks is made of these: with others it is harder or easier, whatever was learnt."""
_FREE = {"cluster", "evaluation", "release", "serving"}
"""Sections by which no trial differs from those before a resume."""
_FREE_KEYS = {"storage.timeout_s"}
"""Likewise; Ray Tune's state holds loggers and pages, which go on with the storage and MLflow of the beginning."""
_STOPPED = {"random", "grid", "tpe"}
"""Algorithms whose trials `sweep.early_stopping` stops."""


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
    _check_measure(config)
    _check_stops(config)
    if config.sweep.mlflow_uri is not None:
        _check_mlflow(config.sweep.mlflow_uri)


def _check_measure(config: RunConfig) -> None:
    questions = set(_QUESTIONS)
    if config.objective.name == "next_item" and config.recommendation.candidates == "batch":
        questions.add("train.micro_batch_size")  # the candidates are those of a micro-batch
    if config.objective.name == "distillation":
        questions.add("train.micro_batch_size")  # each text is looked for among those of a micro-batch
    measures = [key for key in config.sweep.space if key.startswith(_MEASURES) and key not in questions]
    if config.sweep.metric == "loss" and measures:
        raise ConfigError(
            f"sweep.metric=loss is another measure with every {measures[0]}; compare trials by accuracy, or leave "
            "the key out of sweep.space"
        )
    if asked := [key for key in config.sweep.space if key in questions]:
        raise ConfigError(
            f"sweep.space.{asked[0]}: the validation of each trial would ask another question, so trials could not be "
            "compared; leave the key out"
        )


def _check_stops(config: RunConfig) -> None:
    """Refuses early stops and clones for which no validation is left."""
    sweep, steps, every = config.sweep, config.train.steps, config.train.validate_every
    if sweep.algorithm == "pbt" and not 2 <= sweep.num_trials <= sweep.max_concurrent:
        raise ConfigError(
            f"sweep.algorithm=pbt runs its whole population side by side: sweep.num_trials={sweep.num_trials} must "
            f"be 2 or more, and sweep.max_concurrent={sweep.max_concurrent} as many"
        )
    stops = sweep.early_stopping and sweep.algorithm in _STOPPED
    first = -(-sweep.grace_steps // every) * every
    if (stops or sweep.algorithm == "pbt") and first >= steps:
        what = "cloned" if sweep.algorithm == "pbt" else "stopped early"
        raise ConfigError(
            f"no trial could be {what}: the first validation from sweep.grace_steps={sweep.grace_steps} on is at "
            f"{first}, and train.steps={steps}; lower grace_steps or train.validate_every"
            + ("" if sweep.algorithm == "pbt" else ", or set sweep.early_stopping=false")
        )


def _check_mlflow(uri: str) -> None:
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError("sweep.mlflow_uri needs MLflow: pip install 'mlray[mlflow]'")
    try:
        importlib.import_module("mlflow").MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # of whatever keeps it: a database, HTTP, files
        why = str(error).strip() or type(error).__name__
        raise ConfigError(f"sweep.mlflow_uri={uri} does not answer: {why.splitlines()[0]}") from None


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
        changed = [
            key
            for key, value in now[section].items()
            if before[section][key] != value and f"{section}.{key}" not in _FREE_KEYS
        ]
        if changed:
            raise ConfigError(
                f"{section}.{changed[0]} is not what {root} was begun with; set it back, or begin with another run.name"
            )


@contextlib.contextmanager
def claimed(config: RunConfig, root: str, *, resume: bool) -> Iterator[None]:
    """Writes what is searched; a sweep that somebody else has begun here meanwhile is left alone.

    Should the block fail, in which the sweep is prepared, another may begin here.

    Raises:
        ConfigError: there is one.
    """
    place = storage.join(root, "config.yaml")
    # The line tells two sweeps of one configuration apart.
    body = f"# begun by {secrets.token_hex(8)}\n{config.to_yaml()}".encode()
    if resume:
        storage.write_bytes(place, body, config.storage)
    elif not storage.create_bytes(place, body, config.storage):
        raise ConfigError(
            f"another sweep was begun in {root} at the same time; this one ends, that one goes on"
        )
    try:
        yield
    except BaseException:
        if not resume:
            storage.delete(root, "config.yaml", config.storage)
        raise


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
    cluster = config.cluster
    together = cluster.model_copy(update={"num_workers": cluster.num_workers * count})
    one, needed = placement.wanted_cpus(config), DRIVER_CPUS * drivers + placement.wanted_cpus(config) * count
    try:
        placement.check(config.model_copy(update={"cluster": together}))  # waits for nodes that are to come
        fits = placement.cpus() + 1e-9 >= needed
    except ConfigError:
        fits = False
    if not fits:
        raise ConfigError(
            f"sweep.max_concurrent: {drivers} trials at a time cannot be placed: each needs {one + DRIVER_CPUS:g} CPU "
            f"with its driver and input pipeline and {cluster.num_workers * cluster.gpus_per_worker:g} GPU, and the "
            f"cluster offers {placement.cpus():g} CPU; lower sweep.max_concurrent, cluster.num_workers or "
            "cluster.cpus_per_worker"
        )
