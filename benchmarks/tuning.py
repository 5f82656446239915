"""How much a search costs: ours beside the grid, stock Ray Tune and Optuna, on a real table of learning curves.

    python benchmarks/tuning.py [--seeds 5] [--trials 64]

First the table: an encoder of texts is aligned on sentences and their translations (`../shared/data/opus_tatoeba`, or
`--data`) with each of 64 settings (rate, temperature, negatives, dropout), and its validation after every one of 27
stretches of 16 steps is kept: the objective of the sweep, macro - 0.5 x gap, over 128 held-out pairs in each of four
pairs of languages. Then each searcher looks for the best of the 64 with trials that only read the table, five times
with other seeds. What counts is how many stretches ("epochs") all its trials made until one of them, trained to its
end, was within 0.5 % of the grid's best; the whole grid makes 64 x 27. A searcher that ends without one has missed
it, and counts as the whole grid. Wall time a trial, with trials that do nothing, is the overhead of the search;
`one_step` is that of real ones: `jobs/sweep.py` on the sample corpus with trials of one step, workers, engine and
validation included.

grid       all of them, to the end
asha       Ray Tune's random search with its ASHA (eta 4, first rung 1)
asha-tpe   Ray Tune's OptunaSearch (TPE) with the same ASHA
optuna     Optuna alone: TPE with its median pruner
ours       `sweep.algorithm=tpe` with early stopping, the sweep as it is
random     `sweep.algorithm=random` with early stopping
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "shared" / "data" / "opus_tatoeba"
STRETCHES, STEPS = 27, 16
"""Validations of a trial, and optimiser steps between two."""
SPACE = {
    "train.lr": [3e-4, 1e-3, 3e-3, 1e-2],
    "contrastive.temperature": [0.02, 0.05, 0.1, 0.2],
    "contrastive.negatives": ["targets", "all"],
    "model.dropout": [0.0, 0.3],
}
PACKAGES = ("ray", "optuna", "torch")
NEAR = 0.005
_ONE_STEP = (
    *("model.path=null", "model.hidden_size=64", "model.num_layers=2", "model.num_heads=2"),
    *("model.intermediate_size=128", "tokenizer.vocab_size=2000", "adapter.kind=none"),
    *("train.steps=1", "train.warmup_steps=0", "train.validate_every=1", "train.checkpoint_every=1"),
    *(
        "sweep.early_stopping=false",
        "sweep.max_concurrent=1",
        "sweep.space={train.lr: {loguniform: [0.001, 0.01]}}",
    ),
)
"""A sweep of the sample corpus whose trials cost next to nothing themselves."""


def main() -> int:
    arguments = parse()
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="2")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    report: dict[str, Any] = {"machine": measure.machine(PACKAGES), "stretches": STRETCHES, "space": SPACE}
    place = arguments.results / "tuning_table.json"
    report["table"] = json.loads(place.read_text()) if place.is_file() else curves(place, arguments.data)
    best = max(curve[-1] for curve in report["table"].values())
    import ray

    ray.init(num_cpus=4, logging_level="error", log_to_driver=False)
    report["best"] = best
    report["searches"] = {
        name: [told(search(seed, arguments.trials, report["table"]), best) for seed in range(arguments.seeds)]
        for name, search in SEARCHES.items()
    }
    report["overhead_s"] = overhead(arguments.rounds)
    ray.shutdown()
    report["one_step"] = one_step(3)
    report["machine"]["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    path = measure.write_json("tuning", report, arguments.results)
    print(f"{render(report)}\nfigures: {path.name}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a search costs, beside peers.")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with the files of four pairs of languages"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=64, help="of a searcher at most")
    parser.add_argument("--rounds", type=int, default=5, help="of the overhead")
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    return parser.parse_args()


def settings() -> list[dict[str, Any]]:
    """The 64 points of the grid."""
    return [dict(zip(SPACE, values, strict=True)) for values in itertools.product(*SPACE.values())]


def key(values: dict[str, Any]) -> str:
    """What the table calls a point."""
    return json.dumps({name: values[name] for name in SPACE})


def curves(place: Path, data: Path) -> dict[str, list[float]]:
    """Trains every point without Ray and keeps its objective after every stretch."""
    from tuning_work import Work

    found: dict[str, list[float]] = {}
    work = Work(data, STRETCHES, STEPS)
    for number, values in enumerate(settings(), start=1):
        begin = time.perf_counter()
        found[key(values)] = work.train(values)
        print(
            f"{number} of 64: {found[key(values)][-1]:.4f}, {time.perf_counter() - begin:.1f} s", flush=True
        )
    place.write_text(json.dumps(found, indent=1) + "\n")
    return found


Made = list[tuple[float, int]]
"""Of each trial in the order in which they ended: its last objective, and its stretches."""


def told(made: Made, best: float) -> dict[str, Any]:
    """Stretches until a trial that was trained to its end came near the best.

    Args:
        made: by a searcher.
        best: of the grid.
    """
    spent = 0
    for objective, stretches in made:
        spent += stretches
        if stretches == STRETCHES and objective >= best * (1 - NEAR):
            return {"epochs": spent, "hit": True, "trials": len(made), "all_epochs": sum(n for _, n in made)}
    return {"epochs": spent, "hit": False, "trials": len(made), "all_epochs": spent}


def grid(seed: int, trials: int, table: dict[str, list[float]]) -> Made:  # noqa: ARG001
    """Every point to its end, in a seeded order."""
    order = list(table)
    random.Random(seed).shuffle(order)
    return [(table[name][-1], STRETCHES) for name in order]


def replay(values: dict[str, Any], table: dict[str, list[float]]) -> None:
    """A trial of Ray Tune that reads the table."""
    from ray import tune

    for stretch, objective in enumerate(table[key(values)], start=1):
        tune.report(
            {
                "objective": objective,
                "macro": objective,
                "worst": objective,
                "worst_language": "all",
                "step": stretch,
                "below_floor": [],
                "now": time.time(),
                "values": values,
                "run": tune.get_context().get_trial_id(),
                "cloned_from": "",
                "languages": {"all": {"accuracy": objective}},
            }
        )


def asha(seed: int, trials: int, table: dict[str, list[float]]) -> Made:
    """Ray Tune as its guide has it."""
    from ray.tune.search import BasicVariantGenerator

    return stock(BasicVariantGenerator(random_state=seed, max_concurrent=1), trials, table)


def asha_tpe(seed: int, trials: int, table: dict[str, list[float]]) -> Made:
    """Ray Tune with Optuna's suggestions."""
    import optuna
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    searcher = OptunaSearch(sampler=optuna.samplers.TPESampler(seed=seed), metric="objective", mode="max")
    return stock(ConcurrencyLimiter(searcher, max_concurrent=1), trials, table)


def stock(searcher: Any, trials: int, table: dict[str, list[float]]) -> Made:
    """Ray Tune's own ASHA with a searcher."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    with tempfile.TemporaryDirectory() as folder:
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(replay, table=table), {"CPU": 1}),
            param_space={name: tune.choice(values) for name, values in SPACE.items()},
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="max",
                num_samples=trials,
                scheduler=ASHAScheduler(
                    time_attr="step", max_t=STRETCHES, grace_period=1, reduction_factor=4
                ),
                search_alg=searcher,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        assert not results.errors, results.errors
        return ended([one.metrics for one in results if one.metrics])


def ended(metrics: list[dict[str, Any]]) -> Made:
    """Trials, one at a time, in the order in which they made their last report."""
    ordered = sorted(metrics, key=lambda one: one["now"])
    return [(float(one["objective"]), int(one["step"])) for one in ordered]


def optuna(seed: int, trials: int, table: dict[str, list[float]]) -> Made:
    """Optuna's loop with its pruner."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made: Made = []

    def objective(trial: Any) -> float:
        curve = table[key({name: trial.suggest_categorical(name, values) for name, values in SPACE.items()})]
        for stretch, value in enumerate(curve, start=1):
            trial.report(value, stretch)
            if stretch < STRETCHES and trial.should_prune():
                made.append((value, stretch))
                raise optuna.TrialPruned
        made.append((curve[-1], STRETCHES))
        return curve[-1]

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(),
    )
    study.optimize(objective, n_trials=trials)
    return made


def sweeping(algorithm: str) -> Any:
    """A search of `mlray.tuning.sweep` with trials that read the table."""

    def search(seed: int, trials: int, table: dict[str, list[float]]) -> Made:
        from ray import tune

        from mlray import configuration
        from mlray.tuning import space, sweep
        from mlray.tuning.board import Board
        from mlray.tuning.dashboard import Dashboard

        with tempfile.TemporaryDirectory() as folder:
            config = configuration.build(
                {
                    "run": {"storage_uri": folder, "name": "search", "seed": seed},
                    "objective": {"name": "contrastive"},
                    "train": {"steps": STRETCHES},
                    "sweep": {
                        "space": {name: {"choice": values} for name, values in SPACE.items()},
                        "algorithm": algorithm,
                        "num_trials": trials,
                        "max_concurrent": 1,
                        "grace_steps": 1,
                        "reduction_factor": 4,
                        "gap_weight": 0.0,
                    },
                }
            )
            dashboard = Dashboard(Board("search", config, ("all",)), folder)
            trainable = tune.with_resources(tune.with_parameters(replay, table=table), {"CPU": 1})
            results = sweep.tuner(trainable, space.build(config), config, dashboard, resume=False).fit()
            assert not results.errors, results.errors
            return ended([one.metrics for one in results if one.metrics])

    return search


SEARCHES: dict[str, Any] = {
    "grid": grid,
    "asha": asha,
    "asha-tpe": asha_tpe,
    "optuna": optuna,
    "random": sweeping("random"),
    "ours": sweeping("tpe"),
}


def overhead(rounds: int) -> dict[str, Any]:
    """Seconds a trial of 16 that do nothing but report once; Optuna's are calls of a function."""
    table = {key(values): [1.0] for values in settings()}
    found: dict[str, list[float]] = {"asha": [], "asha-tpe": [], "optuna": [], "ours": []}
    for _ in range(rounds):
        for name in found:
            begin = time.perf_counter()
            SEARCHES[name](0, 16, table)
            found[name].append((time.perf_counter() - begin) / 16)
    return {name: measure.spread(values) for name, values in found.items()}


def one_step(rounds: int) -> dict[str, Any]:
    """Seconds a trial of one step, one at a time: what six more of them cost, so that all else falls out."""
    few, many = 2, 8
    walls: dict[int, list[float]] = {few: [], many: []}
    for _ in range(rounds):
        for count, own in walls.items():
            with tempfile.TemporaryDirectory() as folder:
                changed = [f"run.storage_uri={folder}", f"sweep.num_trials={count}", *_ONE_STEP]
                command = [
                    sys.executable,
                    "jobs/sweep.py",
                    "--config",
                    "jobs/configs/sweep_sample.yaml",
                    *changed,
                ]
                begin = time.perf_counter()
                subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
                own.append(time.perf_counter() - begin)
    trials = [(more - less) / (many - few) for less, more in zip(walls[few], walls[many], strict=True)]
    return {"wall_s": walls, "s_a_trial": measure.spread(trials)}


def render(report: dict[str, Any]) -> str:
    """A row for each searcher."""
    whole = len(report["table"]) * STRETCHES
    stock = [one["epochs"] if one["hit"] else whole for one in report["searches"]["asha"]]
    rows = []
    for name, runs in report["searches"].items():
        epochs = [one["epochs"] if one["hit"] else whole for one in runs]
        rows.append(
            (
                name,
                f"{sum(one['hit'] for one in runs)} of {len(runs)}",
                str(measure.spread(epochs)),
                str(measure.ratio([whole] * len(epochs), epochs)),
                str(measure.ratio(stock, epochs)),
                str(report["overhead_s"].get(name, "-")),
            )
        )
    header = ("search", "found", "epochs until then", "grid / it", "stock ASHA / it", "s a no-op trial")
    one = f"a real trial of one step: {report['one_step']['s_a_trial']} s"
    return f"{measure.table(header, rows)}\n{one}"


if __name__ == "__main__":
    sys.exit(main())
