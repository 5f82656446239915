"""A sweep on S3: trials share rows and backbone, a killed driver loses none that has ended, the winner is evaluated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.util.state import list_actors

from mlray import configuration, storage
from mlray.config import ConfigError, RunConfig
from mlray.corpus import packing, stream
from mlray.training import checkpoint, fit
from mlray.training.pretrain import prepare
from mlray.tuning import space
from mlray.tuning.board import Board
from mlray.tuning.dashboard import Dashboard
from mlray.tuning.sweep import sweep, tuner
from tests.cluster import corpus as sample
from tests.cluster.conftest import ROOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"),
]

SPACE = {"adapter.rank": {"choice": [2, 4]}, "train.lr": {"choice": [1e-9, 5e-3]}}


def searching(bucket: str, name: str, **sweep_settings: Any) -> RunConfig:
    """Adapters on the aligned encoder, two workers a trial; 20 steps, a validation every five."""
    return sample.aligning(
        bucket,
        name,
        model={"path": sample.weights(bucket)},
        adapter={"kind": "lora"},
        train={"steps": 20, "validate_every": 5, "checkpoint_every": 10},
        sweep={"space": SPACE, "min_rows": 4, "grace_steps": 5, "reduction_factor": 2, **sweep_settings},
    )


def test_shared_rows_come_in_the_order_of_the_stream(aligned: RunConfig, bucket: str) -> None:
    """By hand for two workers: the rows of each are those that a run of its own would be dealt."""
    config = prepare(searching(bucket, "rows")).config
    shared = fit.share(config, rows=True)
    assert shared.rows is not None
    assert ray.get(shared.backbone)["config.json"].tobytes() == storage.read_bytes(
        f"{sample.weights(bucket)}/config.json", config.storage
    )
    values = config.model_dump(mode="json")

    def dealt(rows: Any) -> list[list[Any]]:
        opened = fit._open_stream(values, rows)
        opened.context.execution_options = stream.execution_options()
        shards = opened.streaming_split(2, equal=True)
        read = ray.remote(_documents)
        return ray.get([read.remote(shard, config.train.steps) for shard in shards])

    assert dealt(shared.rows) == dealt(None)


def _documents(shard: Any, steps: int) -> list[Any]:
    found = []
    for number, table in enumerate(shard.iter_batches(batch_size=4, batch_format="pyarrow", drop_last=True)):
        if number == steps:
            break
        found.append(packing.unpack(table).documents_D.tolist())
    return found


def test_a_killed_sweep_goes_on_and_loses_no_trial_that_has_ended(
    aligned: RunConfig, bucket: str, tmp_path: Path
) -> None:
    rates = {"train.lr": {"choice": [1e-9, 2e-9, 0.1]}}  # the last ruins what was learnt before
    # One after the other: the last is measured by the one before, by loss, as few held-out pairs tie otherwise.
    made = searching(bucket, "swept", algorithm="grid", max_concurrent=1, metric="loss", space=rates)
    others = _training()
    path = tmp_path / "sweep.yaml"
    path.write_text(made.to_yaml())
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "jobs/sweep.py", "--config", str(path), f"cluster.address={address}"]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    results = f"s3://{bucket}/runs/swept/trials.json"

    def states() -> dict[str, str]:
        if not storage.exists(results, made.storage):
            return {}
        found: dict[str, str] = json.loads(storage.read_bytes(results, made.storage))["states"]
        return found

    end, seen = time.monotonic() + 300, set[tuple[str, str]]()
    while not {"done", "stopped"} & set(states().values()):
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        assert process.poll() is None, (tmp_path / "log").read_text()
        seen |= _training() - others
        time.sleep(0.5)
    assert seen
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ended = [name for name, state in states().items() if state != "runs"]
    before = json.loads(storage.read_bytes(results, made.storage))["rows"]
    outcome = sweep(made, resume=True)
    end = time.monotonic() + 30
    while alive := _training() - others:
        assert time.monotonic() < end, alive  # of trials that were stopped too
        time.sleep(0.5)
    after = json.loads(storage.read_bytes(results, made.storage))
    steps = {values["train.lr"]: 0 for values in after["values"].values()}
    for row in after["rows"]:
        steps[after["values"][row["trial"]]["train.lr"]] = row["step"]
    assert sorted(after["states"].values()) == ["done", "done", "stopped"]  # ASHA, with workers of Ray Train
    assert (steps[1e-9], steps[2e-9]) == (20, 20)
    assert 0 < steps[0.1] < 20
    events = [
        path for path in storage.walk(f"s3://{bucket}/runs/swept/tune", made.storage) if "events.out" in path
    ]
    assert len({path.partition("/")[0][:11] for path in events}) == 3  # for TensorBoard
    for name in ended:
        assert [row for row in after["rows"] if row["trial"] == name] == [
            row for row in before if row["trial"] == name
        ]
    assert outcome.failed == {}
    folder = f"s3://{bucket}/runs/swept/{outcome.winner}"
    assert storage.exists(f"{folder}/evaluation/report.json", made.storage)
    page = storage.read_bytes(f"s3://{bucket}/runs/swept/dashboard.html", made.storage).decode()
    assert all(name in page for name in after["states"])
    with pytest.raises(ConfigError, match="holds a sweep; --resume goes on with it"):
        sweep(made)


def test_a_population_clones_a_trial_whose_checkpoint_stays(aligned: RunConfig, bucket: str) -> None:
    made = searching(
        bucket,
        "bred",
        algorithm="pbt",
        metric="loss",  # of few held-out pairs two trials may find as many
        num_trials=2,
        max_concurrent=2,
        space={"train.lr": {"loguniform": [1e-9, 1e-2]}},
    )
    small = {"cluster.num_workers": 1, "cluster.cpus_per_worker": 0.25, "corpus.tokenize_cpus": 0.25}
    # Long enough that the first trial is not over before the second has begun.
    made = configuration.change(made, small | {"train.steps": 100})
    outcome = sweep(made)
    assert outcome.failed == {}
    clones = [row for row in outcome.rows if row.cloned_from]
    assert clones
    last = {row.trial: row.run for row in outcome.rows}
    for row in clones:
        assert checkpoint.verify(row.cloned_from, made.storage) is None  # whole, though the sweep is over
        donor = json.loads(storage.read_bytes(f"{row.cloned_from}/progress.json", made.storage))
        assert 0 < donor["step"] < row.step
        own, _ = checkpoint.newest(f"s3://{bucket}/runs/bred/{row.run}/checkpoints", made.storage)
        assert own is not None
        before = len(donor["losses"])
        assert [list(one) for one in own.progress.losses[:before]] == donor["losses"]  # it goes on from there
        # A clone may itself be given up for another: only the last of a trial makes all steps.
        assert own.progress.step == made.train.steps or last[row.trial] != row.run
        assert own.progress.step >= row.step
        assert row.trial not in row.cloned_from


def _training() -> set[tuple[str, str]]:
    """Workers and controllers of Ray Train that are there: class and id."""
    actors = list_actors(filters=[("state", "=", "ALIVE")])
    return {(actor.class_name, actor.actor_id) for actor in actors if "Train" in actor.class_name}


def test_trials_that_cannot_be_placed_are_refused(aligned: RunConfig, bucket: str) -> None:
    with pytest.raises(
        ConfigError, match=r"sweep\.max_concurrent: 8 trials at a time cannot be placed: each"
    ):
        sweep(made := searching(bucket, "many", max_concurrent=9, num_trials=8))
    assert not list(storage.walk(f"s3://{bucket}/runs/many", made.storage))


def tell(values: dict[str, Any]) -> None:
    """A trial of three steps: the higher its rate, the better its mean and the worse its worst language."""
    rate = values["train.lr"]
    for step in range(1, 4):
        mean, worst = rate * step, (1.0 - rate) * step
        tune.report(
            {
                "objective": mean,
                "macro": mean,
                "worst": worst,
                "worst_language": "all",
                "step": step,
                "below_floor": [],
                "values": values,
                "run": tune.get_context().get_trial_id(),
                "cloned_from": "",
                "languages": {"all": {"accuracy": mean}},
            }
        )


def told(tmp_path: Path, **settings: Any) -> Board:
    """What the board knows after a search over such trials."""
    config = configuration.build(
        {
            "run": {"storage_uri": str(tmp_path), "name": "told", "seed": 1},
            "objective": {"name": "contrastive"},
            "train": {"steps": 3, "validate_every": 1},
            "sweep": {
                "space": {"train.lr": {"uniform": [0.001, 1.0]}},
                "max_concurrent": 1,
                "grace_steps": 1,
                **settings,
            },
        }
    )
    dashboard = Dashboard(Board("told", config, ("all",)), str(tmp_path))
    trainable = tune.with_resources(tell, {"CPU": 0.5})
    results = tuner(trainable, space.build(config), config, dashboard, resume=False).fit()
    assert not results.errors
    dashboard.read()
    return dashboard.board


def test_asha_stops_at_least_half_of_eight_trials(cluster: str, tmp_path: Path) -> None:
    board = told(tmp_path, num_trials=8)
    assert sorted(board.states.values()).count("stopped") >= 4
    best = board.best()
    assert best is not None
    assert best.step == 3
    rates = {name: values["train.lr"] for name, values in board.values.items()}
    # By hand: whoever is stopped was behind another at its step.
    for name, row in board.last().items():
        if row.step < 3:
            assert any(rates[other] > rates[name] for other, at in board.last().items() if at.step > row.step)


def test_two_objectives_give_a_pareto_set(cluster: str, tmp_path: Path) -> None:
    board = told(tmp_path, num_trials=4, algorithm="pareto")
    assert set(board.states.values()) == {"done"}  # nobody is stopped: which objective would decide?
    assert board.pareto() == board.states.keys()  # the higher the mean, the lower the worst
