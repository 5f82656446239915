"""A sweep: trials over a space of settings, stopped early or cloned, until one is chosen that no language pays for.

<storage_uri>/<name>/config.yaml       what was searched
<storage_uri>/<name>/shared/           manifest and tokenizer, made once
<storage_uri>/<name>/<trial>/          a run of its own: see `training`
<storage_uri>/<name>/tune/             Ray Tune's state, and TensorBoard events of each trial
<storage_uri>/<name>/winner.json       which trial, and its settings
<storage_uri>/<name>/trials.json       every validation of every trial
<storage_uri>/<name>/dashboard.html    the same for people, rewritten while the sweep runs
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator
from rich.console import Console

from mlray import access, configuration, storage
from mlray.config import RunConfig, RunError
from mlray.console import wide
from mlray.training import fit, placement
from mlray.training.fit import Shared
from mlray.training.folders import WINNER, Folders
from mlray.training.pretrain import Prepared, placed, prepare
from mlray.tuning import checks, objective, space, trial
from mlray.tuning.board import Board, Row
from mlray.tuning.dashboard import Dashboard, forgiving
from mlray.tuning.distinct import Distinct
from mlray.tuning.finetune import finetune

_OWN_ROWS = ("corpus.", "objective.", "train.global_batch_size", "train.micro_batch_size")
"""Keys by which a trial reads other rows than its neighbours."""
_OPTUNA = {"tpe", "pareto"}
"""Algorithms that draw each trial when the ones before it have told."""
_BEGUN = "experiment_state-"
"""What Ray Tune can go on with: the file that it writes when the first trials are made."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep has found."""

    winner: str
    """The run of the best trial, below the sweep's folder."""
    values: dict[str, Any]
    rows: tuple[Row, ...]
    """Every validation of every trial."""
    failed: dict[str, str]
    """Trial -> why."""


def sweep(config: RunConfig, *, resume: bool = False) -> Outcome:
    """Runs (or resumes) a sweep, judges its winner on `evaluation.sources`, and prints both.

    Raises:
        ConfigError: the space, the objective or the cluster does not fit; or there is such a sweep already.
        RunError: no trial could be judged, or every one has a language below its floor.
    """
    domains = space.build(config)
    checks.settings(config)
    config = placed(config)
    root = Folders.of(config).root
    checks.begun(config, root, resume=resume)
    # What was begun elsewhere goes on with less, but Ray Tune starts all drivers that were there again.
    drivers = min(config.sweep.max_concurrent, space.wanted(config))
    placement.connect(config)
    checks.room(config, 1 if resume else drivers, drivers)
    with checks.claimed(config, root, resume=resume):
        prepared = prepare(configuration.change(config, _common(config, root)))
        base = prepared.config
        rows = objective.languages(prepared.manifest, base.sweep)
    languages = list(rows)
    shared = _share(base, prepared)
    board = Board(config.run.name, base, tuple(languages), min(rows.values()))
    trainable = tune.with_resources(
        tune.with_parameters(
            trial.run, base=base.model_dump(mode="json"), languages=languages, shared=shared
        ),
        {"CPU": checks.DRIVER_CPUS},
    )
    dashboard = Dashboard(board, root)
    try:
        results = tuner(trainable, domains, base, dashboard, resume=resume).fit()
    except TuneError as error:
        why = str(error).strip() or type(error).__name__
        raise RunError(f"{why.splitlines()[-1]}; --resume goes on") from error
    dashboard.read()
    return _conclude(results, dashboard)


def _common(config: RunConfig, root: str) -> dict[str, Any]:
    """What all trials have that the configuration of the sweep may have otherwise.

    A clone goes on from the checkpoint of its donor's last validation, so each is kept.
    """
    common: dict[str, Any] = {"run.storage_uri": root, "run.name": "shared", "train.resume": True}
    if config.sweep.algorithm == "pbt":
        every = config.train.validate_every
        common |= {"train.checkpoint_every": every, "train.keep_checkpoints": -(-config.train.steps // every)}
    return common


def _share(base: RunConfig, prepared: Prepared) -> Shared:
    own = [key for key in base.sweep.space if key.startswith(_OWN_ROWS)]
    found = fit.share(base, rows=not own)
    if found.rows is None:
        why = f"{own[0]} gives each trial its own" if own else "they would not fit into the object store"
        prepared.console.print(f"rows are read by each trial: {why}", markup=False)
    return found


def tuner(
    trainable: Any, domains: dict[str, Any], base: RunConfig, dashboard: Dashboard, *, resume: bool
) -> tune.Tuner:
    """Ray Tune's search of a space, begun or resumed.

    Args:
        trainable: reports like `trial.run`.
        domains: of `space.build`.
        base: what trials have in common; its `run.storage_uri` is the folder of the sweep.
        dashboard: is told of every trial.
        resume: go on with what lies in the folder, if Ray Tune has begun there.
    """
    place = storage.absolute(base.run.storage_uri)
    filesystem = access.filesystem(base.storage) if access.is_s3(place) else None
    begun = storage.join(place, "tune")
    space_of_tune = {} if base.sweep.algorithm in _OPTUNA else domains  # Optuna draws itself
    if resume and any(name.startswith(_BEGUN) for name in storage.walk(begun, base.storage)):
        return tune.Tuner.restore(
            begun.removeprefix("s3://"),
            trainable,
            resume_unfinished=True,
            storage_filesystem=filesystem,
            param_space=space_of_tune,
        )
    settings, pareto = base.sweep, base.sweep.algorithm == "pareto"
    return tune.Tuner(
        trainable,
        param_space=space_of_tune,
        tune_config=tune.TuneConfig(
            metric=None if pareto else "objective",
            mode=None if pareto else "max",
            num_samples=1 if settings.algorithm == "grid" else settings.num_trials,
            max_concurrent_trials=settings.max_concurrent if settings.algorithm in _OPTUNA else None,
            scheduler=_scheduler(base, domains),
            search_alg=_search(base, domains),
            trial_dirname_creator=lambda one: str(one.trial_id),
            reuse_actors=True,  # a process each costs seconds
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=place.removeprefix("s3://"),
            storage_filesystem=filesystem,
            stop=_over(base),
            callbacks=[dashboard, *_loggers(base)],
            verbose=0,
        ),
    )


def _over(base: RunConfig) -> Any:
    def stop(_: str, result: Mapping[str, Any]) -> bool:
        """Whether a trial has made its steps, or a language is below its floor when it had its time.

        Without the first a population's scheduler would clone another's last step into it, whose score would then stand
        beside settings that have made none.
        """
        step = result.get("step", 0)
        late = step >= base.sweep.grace_steps and bool(result.get("below_floor"))
        return late or step >= base.train.steps

    return stop


def _scheduler(base: RunConfig, domains: dict[str, Any]) -> Any:
    settings = base.sweep
    if settings.algorithm == "pbt":
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=settings.grace_steps,
            hyperparam_mutations=space.mutations(base, domains),
            custom_explore_fn=functools.partial(space.clip, base),
        )
    if not settings.early_stopping or settings.algorithm == "pareto":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="step",
        max_t=base.train.steps,
        grace_period=settings.grace_steps,
        reduction_factor=settings.reduction_factor,
    )


def _search(base: RunConfig, domains: dict[str, Any]) -> Any:
    if base.sweep.algorithm == "tpe":
        return Distinct(domains, metric="objective", mode="max", seed=base.run.seed)
    if base.sweep.algorithm == "pareto":
        best = "min" if base.sweep.metric == "loss" else "max"
        return Distinct(domains, metric=["macro", "worst"], mode=[best, best], seed=base.run.seed)
    return BasicVariantGenerator(max_concurrent=base.sweep.max_concurrent, random_state=base.run.seed)


def _loggers(base: RunConfig) -> list[Any]:
    if base.sweep.mlflow_uri is None:
        return []
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return [
        forgiving(MLflowLoggerCallback)(tracking_uri=base.sweep.mlflow_uri, experiment_name=base.run.name)
    ]


def _finished(board: Board, console: Console) -> tuple[Row, RunConfig, float]:
    """The best trial with all its steps, which are made now where it was stopped; its run, and its objective then.

    Raises:
        RunError: each has a language that has fallen below its floor meanwhile.
    """
    fallen = ""
    for best in (row for row in board.ranked() if not row.below):
        config = trial.configured(board.config, board.values[best.trial], best.run)
        finetune(config)
        told = trial.last(config) if best.step < config.train.steps else None
        if told is None:
            return best, config, best.objective
        found = objective.score(told["languages"], board.languages, board.config.sweep)
        if not found.below:
            return best, config, found.objective
        fallen = (
            f"{best.trial} kept its floors at step {best.step}, and after {told['step']} steps {found.below[0]} is "
            "below its own"
        )
        console.print(f"passed over: {fallen}", markup=False, highlight=False)
    raise RunError(f"no trial can win: {fallen}")


def _trial(result: Any, board: Board) -> str:
    """The trial of a result, whose folder has a suffix where a killed sweep had begun it already."""
    name = Path(result.path).name
    stem = name.rpartition("_")[0]
    return stem if name not in board.states and stem in board.states else name


def _conclude(results: Any, dashboard: Dashboard) -> Outcome:
    board = dashboard.board
    names = {_trial(one, board) for one in results}
    ended, wanted = board.ended_trials(), max(len(names), space.wanted(board.config))
    # One that a killed sweep had just begun may have come again under another name; one that had ended counts, though
    # Ray Tune was killed before it knew.
    board.keep(names | ended)
    left = wanted - len(names & ended)
    board.over = not left
    dashboard.write()
    if left:  # Ray Tune returns at Ctrl-C as if it were done
        raise RunError(
            f"{left} of {wanted} trials have not ended, and none is chosen before all have; --resume goes on"
        )
    failed = {_trial(one, board): str(one.error).splitlines()[-1] for one in results if one.error}
    if board.best() is None:
        told = next(iter(failed.values()), "each has a language below its floor")
        raise RunError(f"no trial of {len(results)} can win: {told}")
    console = wide()
    console.print(board.table())
    console.print(board.heading(), markup=False, highlight=False)
    for name, why in failed.items():
        console.print(f"{name} failed: {why}", markup=False, highlight=False)
    best, config, reached = _finished(board, console)
    winner = {"run": best.run, "values": board.values[best.trial], "objective": reached}
    place = storage.join(config.run.storage_uri, WINNER)
    storage.write_bytes(place, json.dumps(winner, ensure_ascii=False, indent=1).encode(), config.storage)
    console.print(f"winner      {Folders.of(config).root}", markup=False, highlight=False)
    console.print(f"dashboard   {dashboard.place}", markup=False, highlight=False)
    return Outcome(best.run, board.values[best.trial], tuple(board.rows), failed)
