"""How a trial goes on from the checkpoint that Ray Tune names: its own, or that of another trial."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlray import configuration, seal
from mlray.config import ConfigError, RunConfig, RunError
from mlray.tuning import sweep, trial


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


def test_a_clone_has_the_checkpoint_of_its_donor_and_none_of_its_own(tmp_path: Path) -> None:
    donor = saved(tmp_path, "good", 10, 20)[1]
    saved(tmp_path, "bad", 10, 20, 30)
    pointer = Pointer(tmp_path / "pointer", str(donor))
    assert trial._adopt(named(tmp_path, "bad"), pointer) == str(donor)
    assert steps_of(tmp_path, "bad") == ["step-00000020"]
    taken = tmp_path / "bad" / "checkpoints" / "step-00000020"
    assert (taken / "state" / "worker").read_text() == "good 20"
    assert seal.verify(str(taken), "COMMIT.json", named(tmp_path, "bad").storage) is None
    assert steps_of(tmp_path, "good") == ["step-00000010", "step-00000020"]


def test_a_trial_that_goes_on_forgets_what_ray_tune_was_not_told(tmp_path: Path) -> None:
    own = saved(tmp_path, "one", 10, 20, 30)
    pointer = Pointer(tmp_path / "pointer", str(own[1]))
    assert trial._adopt(named(tmp_path, "one"), pointer) == ""
    assert steps_of(tmp_path, "one") == ["step-00000010", "step-00000020"]


def test_a_new_trial_begins_where_its_folder_stands(tmp_path: Path) -> None:
    saved(tmp_path, "one", 10)
    assert trial._adopt(named(tmp_path, "one"), None) == ""
    assert steps_of(tmp_path, "one") == ["step-00000010"]


def test_a_donor_that_is_not_whole_leaves_the_clone_as_it_was(tmp_path: Path) -> None:
    (donor,) = saved(tmp_path, "good", 20)
    (donor / "state" / "worker").write_text("damaged")
    saved(tmp_path, "bad", 10)
    with pytest.raises(
        RunError, match="is no checkpoint to go on from: state/worker does not match its sha256"
    ):
        trial._adopt(named(tmp_path, "bad"), Pointer(tmp_path / "pointer", str(donor)))
    assert steps_of(tmp_path, "bad") == ["step-00000010"]


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
        sweep._check_begun(config, str(tmp_path), resume=True)
    sweep._check_begun(config, str(tmp_path), resume=False)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(ConfigError, match="holds a sweep; --resume goes on with it"):
        sweep._check_begun(config, str(tmp_path), resume=False)
    sweep._check_begun(config, str(tmp_path), resume=True)
    other = configuration.load(None, ["sweep.gap_weight=0.7"])
    with pytest.raises(ConfigError, match=r"sweep\.gap_weight is not what .* was begun with"):
        sweep._check_begun(other, str(tmp_path), resume=True)
