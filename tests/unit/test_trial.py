"""How a trial goes on from the checkpoint that Ray Tune names: its own, or that of another trial."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.logger import LoggerCallback
from rich.console import Console

from mlray import configuration, seal
from mlray.access import StorageError
from mlray.config import ConfigError, RunConfig, RunError
from mlray.training.checkpoint import Progress
from mlray.tuning import checks, sweep, trial
from mlray.tuning.board import Board, Row
from mlray.tuning.dashboard import Dashboard, forgiving
from tests.unit.test_board import board, filled, tell


class Pointer:
    """What Ray Tune hands over: a folder for the time of a block."""

    def __init__(self, folder: Path, uri: str) -> None:
        folder.mkdir()
        (folder / "checkpoint.json").write_text(json.dumps({"uri": uri}))
        self._folder = folder

    @contextlib.contextmanager
    def as_directory(self) -> Iterator[str]:
        yield str(self._folder)


def named(tmp_path: Path, name: str) -> RunConfig:
    return configuration.load(None, [f"run.storage_uri={tmp_path}", f"run.name={name}"])


def saved(tmp_path: Path, name: str, *steps: int) -> list[Path]:
    """Checkpoints as a run leaves them."""
    places = []
    for step in steps:
        place = tmp_path / name / "checkpoints" / f"step-{step:08d}"
        (place / "state").mkdir(parents=True)
        (place / "state" / "worker").write_text(f"{name} {step}")
        (place / "COMMIT.json").write_text(json.dumps({"step": step, "files": seal.describe(place)}))
        places.append(place)
    return places


def steps_of(tmp_path: Path, name: str) -> list[str]:
    return sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())


def shared(tmp_path: Path) -> RunConfig:
    """The run whose corpus and tokenizer all trials have."""
    for name in ("corpus/manifest.json", "tokenizer/tokenizer.json"):
        place = tmp_path / "shared" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(name)
    return named(tmp_path, "shared")


def test_a_clone_gets_a_folder_of_its_own_with_its_donors_checkpoint(tmp_path: Path) -> None:
    donor = saved(tmp_path, "good", 10, 20)[1]
    saved(tmp_path, "bad", 10, 20, 30)
    config, told = trial._placed(shared(tmp_path), {"train.lr": 0.5}, "bad", str(donor))
    assert (config.run.name, config.train.lr, told) == ("bad-clone1", 0.5, str(donor))
    assert steps_of(tmp_path, "bad-clone1") == ["step-00000020"]
    taken = tmp_path / "bad-clone1" / "checkpoints" / "step-00000020"
    assert (taken / "state" / "worker").read_text() == "good 20"
    assert seal.verify(str(taken), "COMMIT.json", config.storage) is None
    assert (tmp_path / "bad-clone1" / "tokenizer" / "tokenizer.json").is_file()
    assert steps_of(tmp_path, "good") == ["step-00000010", "step-00000020"]
    assert steps_of(tmp_path, "bad") == ["step-00000010", "step-00000020", "step-00000030"]
    again, told = trial._placed(shared(tmp_path), {}, "bad", str(taken))  # after a pause
    assert (again.run.name, told) == ("bad-clone1", str(donor))
    twice, told = trial._placed(shared(tmp_path), {}, "bad", str(donor))
    assert twice.run.name == "bad-clone2"
    other, told = trial._placed(shared(tmp_path), {}, "good", str(taken))
    assert (other.run.name, told) == ("good-clone1", str(taken))


def test_a_trial_of_sessions_has_its_items(tmp_path: Path) -> None:
    vectors = tmp_path / "shared" / "items-00.parquet"
    sections = {"objective.name": "next_item", "tokenizer.algorithm": "items", "model.family": "gpt2"}
    base = configuration.change(shared(tmp_path), {**sections, "recommendation.vectors": str(vectors)})
    vectors.write_bytes(b"vectors")
    (tmp_path / "shared" / "frequencies.npy").write_bytes(b"frequencies")
    trial._placed(base, {}, "one", "")
    assert (tmp_path / "one" / "items-00.parquet").read_bytes() == b"vectors"
    assert (tmp_path / "one" / "frequencies.npy").read_bytes() == b"frequencies"


def test_a_trial_that_goes_on_stays_in_its_folder(tmp_path: Path) -> None:
    own = saved(tmp_path, "one", 10, 20, 30)
    for pointer in ("", str(own[1]), f"{own[1]}9"):  # the last is gone: retention has taken it
        config, donor = trial._placed(shared(tmp_path), {}, "one", pointer)
        assert (config.run.name, donor) == ("one", "")
    assert len(steps_of(tmp_path, "one")) == 3


def test_a_donor_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    (donor,) = saved(tmp_path, "good", 20)
    (donor / "state" / "worker").write_text("damaged")
    with pytest.raises(
        RunError, match="is no checkpoint to go on from: state/worker does not match its sha256"
    ):
        trial._placed(shared(tmp_path), {}, "bad", str(donor))
    assert not (tmp_path / "bad-clone1").exists()


def test_a_pointer_is_read_as_it_is_written(tmp_path: Path) -> None:
    assert trial._told(None) == ""
    assert trial._told(Pointer(tmp_path / "pointer", "s3://b/run/checkpoints/step-00000010")).endswith(
        "step-00000010"
    )


def test_a_trial_that_has_ended_only_tells_its_last_report_again(tmp_path: Path) -> None:
    config = named(tmp_path, "shared")
    assert trial._ended(config, "fair") is None
    known = filled()
    tell(known, "running", 10, 0.5, 0.5)
    (tmp_path / "trials.json").write_text(json.dumps(known.state()))
    assert trial._ended(config, "running") is None
    assert trial._ended(config, "never") is None
    before = list(known.rows)
    for name in ("fair", "unfair", "slow"):
        told = trial._ended(config, name)
        assert told is not None
        known.told(name, told)
    assert sorted(known.rows, key=str) == sorted(before, key=str)


def test_every_checkpoint_of_a_population_is_kept() -> None:
    config = configuration.load(
        None, ["sweep.algorithm=pbt", "train.steps=95", "train.validate_every=10", "train.keep_checkpoints=1"]
    )
    common = sweep._common(config, "/root")
    assert (common["train.checkpoint_every"], common["train.keep_checkpoints"]) == (10, 10)
    assert "train.keep_checkpoints" not in sweep._common(configuration.load(None, []), "/root")


def test_a_sweep_is_begun_once_and_resumed_as_it_was(tmp_path: Path) -> None:
    config = configuration.load(None, ["sweep.gap_weight=0.5"])
    with pytest.raises(ConfigError, match="holds no sweep to resume"):
        checks.begun(config, str(tmp_path), resume=True)
    checks.begun(config, str(tmp_path), resume=False)

    def prepare(*, resume: bool = False, fault: str = "") -> None:
        with checks.claimed(config, str(tmp_path), resume=resume):
            if fault:
                raise ConfigError(fault)

    with pytest.raises(ConfigError, match="no such corpus"):
        prepare(fault="no such corpus")
    prepare()  # the one that has failed is not in its way
    with pytest.raises(ConfigError, match=r"another sweep was begun in .* at the same time"):
        prepare()
    with pytest.raises(ConfigError, match="away"):
        prepare(resume=True, fault="away")
    prepare(resume=True)
    with pytest.raises(ConfigError, match="holds a sweep; --resume goes on with it"):
        checks.begun(config, str(tmp_path), resume=False)
    checks.begun(config, str(tmp_path), resume=True)
    other = configuration.load(None, ["sweep.gap_weight=0.7"])
    with pytest.raises(ConfigError, match=r"sweep\.gap_weight is not what .* was begun with"):
        checks.begun(other, str(tmp_path), resume=True)
    elsewhere = [
        "cluster.num_workers=2",
        "evaluation.max_bad_rows=3",
        "storage.timeout_s=3.0",
        "serving.port=1",
    ]
    checks.begun(configuration.load(None, elsewhere), str(tmp_path), resume=True)
    # Ray Tune's state holds callbacks that write to the storage and the MLflow of the beginning.
    for moved in ("storage.endpoint_url=http://127.0.0.1:9", "sweep.mlflow_uri=sqlite:///x.db"):
        with pytest.raises(ConfigError, match=rf"{moved.partition('=')[0]} is not what"):
            checks.begun(configuration.load(None, [moved]), str(tmp_path), resume=True)
    # An older version knew fewer keys: what it did not write is as it is by default.
    (tmp_path / "config.yaml").write_text("sweep: {gap_weight: 0.5}\n")
    checks.begun(config, str(tmp_path), resume=True)


def test_what_would_show_only_after_the_trials_is_refused_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluation\.sources is empty, and the winner of a sweep is judged on them"
    ):
        checks.settings(configuration.load(None, ["objective.name=contrastive"]))
    good = configuration.load("jobs/configs/sweep_sample.yaml", ["model.path=null", "adapter.kind=none"])
    checks.settings(good)
    with pytest.raises(ConfigError, match=r"train\.early_stopping ends a trial before its last step"):
        checks.settings(configuration.change(good, {"train.early_stopping": "macro.loss"}))
    with pytest.raises(
        ConfigError, match=r"sweep\.metric=loss is another measure with every contrastive\.temp"
    ):
        checks.settings(configuration.change(good, {"sweep.metric": "loss"}))
    for name in ("next_item", "distillation"):  # looked for among a micro-batch
        space = {"train.micro_batch_size": {"choice": [2, 4]}}
        sections = {
            "objective": good.objective.model_copy(update={"name": name}),
            "recommendation": good.recommendation.model_copy(update={"candidates": "batch"}),
            "sweep": good.sweep.model_copy(update={"space": space}),
        }
        with pytest.raises(
            ConfigError, match=r"sweep\.space\.train\.micro_batch_size: the validation of each"
        ):
            checks._check_measure(good.model_copy(update=sections))
    for asked in ("objective.mask_rate", "recommendation.candidates"):
        space = {asked: {"choice": [0.2] if "rate" in asked else ["all"]}}
        with pytest.raises(
            ConfigError, match=rf"sweep\.space\.{asked}: the validation of each trial would ask"
        ):
            checks.settings(configuration.change(good, {"sweep.space": space}))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"sweep\.mlflow_uri needs MLflow"):
        checks.settings(configuration.change(good, {"sweep.mlflow_uri": "sqlite:///x.db"}))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (
            {"sweep.grace_steps": 100, "train.steps": 100},
            "stopped early: .*=100 on is at 100, and train.steps=100",
        ),
        (
            {"sweep.grace_steps": 70, "train.steps": 100, "train.validate_every": 50},
            "stopped early: .* is at 100",
        ),
        ({"sweep.grace_steps": 50, "train.steps": 100, "train.validate_every": 50}, ""),
        ({"sweep.grace_steps": 100, "train.steps": 100, "sweep.early_stopping": False}, ""),
        ({"sweep.grace_steps": 100, "train.steps": 100, "sweep.algorithm": "pareto"}, ""),
        (
            {
                "sweep.grace_steps": 100,
                "train.steps": 100,
                "sweep.algorithm": "pbt",
                "sweep.max_concurrent": 8,
            },
            "cloned",
        ),
        ({"sweep.algorithm": "pbt", "sweep.max_concurrent": 7}, "runs its whole population side by side"),
    ],
)
def test_stops_for_which_no_validation_is_left_are_refused(changes: dict[str, Any], refused: str) -> None:
    config = configuration.change(
        configuration.load(None, ["sweep.num_trials=8", "train.validate_every=10"]), changes
    )
    if refused:
        with pytest.raises(ConfigError, match=refused):
            checks._check_stops(config)
    else:
        checks._check_stops(config)


def test_no_trial_wins_before_all_have_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Tune returns at Ctrl-C as if it were done."""
    known = filled()
    known.config = configuration.change(
        known.config, {"sweep.num_trials": 5, "run.storage_uri": str(tmp_path)}
    )
    tell(known, "running", 10, 0.9, 0.9)
    shown = Dashboard(known, str(tmp_path))
    results = [
        SimpleNamespace(path=f"{tmp_path}/tune/{name}") for name in ("fair", "unfair", "weak", "running")
    ]
    # "slow" had ended before the driver was killed, and Ray Tune has not heard of it.
    with pytest.raises(RunError, match=r"^2 of 5 trials have not ended, .*; --resume goes on$"):
        sweep._conclude(results, shown)
    assert set(known.states) == {"fair", "unfair", "weak", "slow", "running"}
    assert not (tmp_path / "winner.json").exists()
    assert "http-equiv" in (tmp_path / "dashboard.html").read_text()  # it is to go on


def test_a_sweep_leaves_what_another_has_begun_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other begins while this one waits for nodes."""
    root = tmp_path / "search"
    space = "sweep.space={train.lr: {loguniform: [0.001, 0.01]}}"
    config = configuration.load(None, [f"run.storage_uri={tmp_path}", "run.name=search", space])

    def wait_for_nodes(*_: object) -> None:
        root.mkdir()
        (root / "config.yaml").write_text("another")

    monkeypatch.setattr(sweep.placement, "connect", lambda _: None)
    monkeypatch.setattr(sweep.checks, "settings", lambda _: None)
    monkeypatch.setattr(sweep.checks, "room", wait_for_nodes)
    with pytest.raises(ConfigError, match="this one ends, that one goes on"):
        sweep.sweep(config)
    assert [path.name for path in root.iterdir()] == ["config.yaml"]
    assert (root / "config.yaml").read_text() == "another"


def test_a_trial_that_was_begun_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Tune gives the folder of the second time another name."""
    known = board()
    known.config = configuration.change(
        known.config, {"sweep.num_trials": 2, "run.storage_uri": str(tmp_path)}
    )
    for name in ("4a63e_00000", "4a63e_00001"):
        tell(known, name, 90, 0.5, 0.5)
        known.ended(name)
    known.states["4a63e_00001"] = "failed"
    results = [
        SimpleNamespace(path=f"{tmp_path}/tune/{name}", error=error)
        for name, error in (("4a63e_00000", None), ("4a63e_00001_01bc", RuntimeError("why")))
    ]
    monkeypatch.setattr(sweep, "finetune", lambda _: None)
    outcome = sweep._conclude(results, Dashboard(known, str(tmp_path)))
    assert (outcome.winner, outcome.failed) == ("4a63e_00000", {"4a63e_00001": "why"})


def test_a_dashboard_that_cannot_be_written_fails_no_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    shown = Dashboard(filled(), f"{tmp_path}/file")
    shown.on_trial_complete(SimpleNamespace(trial_id="weak"))
    shown.on_trial_error(SimpleNamespace(trial_id="slow"))
    assert shown.board.states["slow"] == "failed"
    assert capsys.readouterr().out.count("the dashboard is written again later") == 2
    with pytest.raises(StorageError):
        shown.on_experiment_end()
    (tmp_path / "file").unlink()
    shown.on_experiment_end()
    again = Dashboard(filled(), f"{tmp_path}/file")
    again.read()
    assert again.board.states == shown.board.states


def test_the_page_is_not_rewritten_for_each_of_many_short_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known is kept each time."""
    shown, now = Dashboard(filled(), str(tmp_path)), 100.0
    monkeypatch.setattr("mlray.tuning.dashboard.time.monotonic", lambda: now)
    pages, place = [], tmp_path / "dashboard.html"
    for now, name in ((100.0, "weak"), (100.5, "fair"), (102.0, "slow")):  # noqa: B007
        shown.on_trial_complete(SimpleNamespace(trial_id=name))
        pages.append(place.read_text())
        known = Dashboard(filled(), str(tmp_path))
        known.read()
        assert name in known.board.ended_trials()
    assert pages[0] == pages[1] != pages[2]


def test_a_trial_whose_last_report_was_lost_tells_it_again(tmp_path: Path) -> None:
    config = named(tmp_path, "one")
    assert trial.last(config) is None
    for step in (10, 20):
        place = tmp_path / "one" / "checkpoints" / f"step-{step:08d}"
        place.mkdir(parents=True)
        scores = {"de": {"accuracy": step / 100}}
        progress = Progress(
            step=step, losses=[(step, 1.5, 7)], validations=[{"step": step, "languages": scores}]
        )
        (place / "progress.json").write_text(progress.to_json())
        (place / "COMMIT.json").write_text(json.dumps({"step": step, "files": seal.describe(place)}))
    assert trial.last(config) == {
        "step": 20,
        "loss": 1.5,
        "languages": {"de": {"accuracy": 0.2}},
        "checkpoint": str(place),
    }


def test_a_trial_is_over_at_its_last_step_or_below_a_floor() -> None:
    base = configuration.build({"train": {"steps": 40}, "sweep": {"grace_steps": 10}})
    over = sweep._over(base)
    assert not over("a", {"step": 9, "below_floor": ["ja"]})
    assert over("a", {"step": 10, "below_floor": ["ja"]})
    assert not over("a", {"step": 39, "below_floor": []})
    # Before a population's scheduler clones another into it.
    assert over("a", {"step": 40, "below_floor": []})


def test_a_winner_that_falls_below_its_floor_later_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    base = configuration.build({"train": {"steps": 40}, "sweep": {"floors": {"ja": 0.4}, "gap_weight": 0.5}})
    board = Board("swept", base, ("de", "ja"))
    best = Row("a", 15, 0.5, 0.6, 0.41, "ja", (), {"de": 0.79, "ja": 0.41}, "a")
    told = {"step": 40, "languages": {"de": {"accuracy": 0.8}, "ja": {"accuracy": 0.5}}}
    fair = {"step": 40, "languages": {"de": {"accuracy": 0.5}, "ja": {"accuracy": 0.5}}}
    monkeypatch.setattr(trial, "last", lambda config: {"a": told, "b": fair}[config.run.name])
    finished = list[str]()
    monkeypatch.setattr(sweep, "finetune", lambda config: finished.append(config.run.name))
    board.rows, board.values, board.states = [best], {"a": {}, "b": {}}, {"a": "stopped", "b": "stopped"}
    shown = Console(file=(text := io.StringIO()), width=200)
    row, config, reached = sweep._finished(board, shown)
    assert (row, config.run.name) == (best, "a")
    assert reached == pytest.approx(0.65 - 0.5 * 0.15)  # by hand
    told["languages"]["ja"]["accuracy"] = 0.35
    with pytest.raises(
        RunError, match="no trial can win: a kept its floors at step 15, and after 40 steps ja"
    ):
        sweep._finished(board, shown)
    # The next best one may have kept them.
    board.rows.append(replace(best, trial="b", run="b", objective=0.4))
    row, config, reached = sweep._finished(board, shown)
    assert (row.trial, config.run.name, reached) == ("b", "b", 0.5)
    assert "passed over: a kept its floors at step 15" in text.getvalue()
    assert finished == ["a", "a", "a", "b"]


def test_a_logger_that_is_away_fails_no_trial(capsys: pytest.CaptureFixture[str]) -> None:
    class Away(LoggerCallback):
        def log_trial_result(self, *_: Any) -> None:
            raise ConnectionError("no answer\nof the server")

        def log_trial_end(self, *_: Any) -> None:
            raise ConnectionError

    logger = forgiving(Away)()
    logger.on_trial_result(1, [], "a", {})
    logger.on_trial_complete(1, [], "a")
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "no answer; the trial goes on",
        "ConnectionError; the trial goes on",
    ]
