"""Checkpoints: what is written is read back, and nothing that happens to one costs the one before it."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open

from mlray.config import RunConfig, RunError
from mlray.models import backbone
from mlray.models.backbone import MaskedEncoder
from mlray.schema import Position
from mlray.training import checkpoint
from mlray.training.checkpoint import COMMIT, Progress
from mlray.training.engine import Engine
from tests.unit import tiny

pytestmark = tiny.DEEPSPEED_WARNINGS

State = dict[str, dict[str, torch.Tensor]]


def at(step: int) -> Progress:
    """Progress that fills every field."""
    return Progress(
        step=step,
        position=Position(3, 40 + step),
        tokens={"de": 120.0, "zh-Hant": 7.0},
        documents={"de": 9.0, "zh-Hant": 1.0},
        best=2.5,
        stale=1,
        digest=76 + step,
        losses=[(step, 3.25, 77)],
        validations=[{"step": step, "languages": {"de": {"loss": 1.5}}}],
        seconds=4.5,
    )


class Run:
    """A model, its engine and a folder of checkpoints."""

    def __init__(self, folder: Path, steps: int = 3) -> None:
        config = tiny.train(steps=steps)
        self.folder = folder
        self.model: MaskedEncoder = tiny.encoder()
        self.engine = Engine(self.model, config, 1)
        tiny.advance(self.engine, tiny.deal(tiny.rows(8 * steps), 8), config)

    def save(self, step: int) -> Path:
        text = RunConfig().to_yaml()
        export = tiny.export(self.model)
        return Path(checkpoint.save(self.engine, at(step), text, export, str(self.folder), tiny.STORAGE))

    def state(self) -> State:
        return {name: {k: v.clone() for k, v in tensors.items()} for name, tensors in self.engine.state()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three steps with two checkpoints, 1 and 2; tests work on copies of them."""
    run = Run(tmp_path_factory.mktemp("run"))
    run.save(1)
    run.save(2)
    return run


@pytest.fixture
def folder(trained: Run, tmp_path: Path) -> Path:
    """A copy of the two checkpoints."""
    return Path(shutil.copytree(trained.folder, tmp_path / "checkpoints"))


def newest_step(folder: Path) -> tuple[int | None, list[str]]:
    found, refused = checkpoint.newest(str(folder), tiny.STORAGE)
    return (found.progress.step if found else None), refused


def load(folder: Path) -> State:
    """State of another engine after it read the newest checkpoint."""
    config = tiny.train()
    engine = Engine(tiny.encoder(seed=9), config, 1)
    found, _ = checkpoint.newest(str(folder), tiny.STORAGE)
    assert found is not None
    checkpoint.load(engine, found, tiny.STORAGE)
    return dict(engine.state())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_equal(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert tensors.keys() == {"master", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(tensor, other[name][key]) for key, tensor in tensors.items())


def test_what_is_saved_is_read_back(trained: Run) -> None:
    found, refused = checkpoint.newest(str(trained.folder), tiny.STORAGE)
    assert found is not None
    assert refused == []
    assert found.progress == at(2)
    assert found.uri == str(trained.folder / "step-00000002")
    state = trained.state()
    assert any(tensors["exp_avg_sq"].abs().max() > 0 for tensors in state.values())
    assert_equal(load(trained.folder), state)


def test_weights_and_configuration_open_by_themselves(trained: Run) -> None:
    place = trained.folder / "step-00000002"
    opened = transformers.AutoModelForMaskedLM.from_pretrained(place / "weights")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(opened.eval()(ids).logits, trained.model.model.eval()(ids).logits)
    assert yaml.safe_load((place / "config.yaml").read_text()) == RunConfig().model_dump(mode="json")


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == (None, [])
    assert newest_step(tmp_path / "absent") == (None, [])


def test_nothing_in_it_is_pickled(trained: Run) -> None:
    for path in files(trained.folder):
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text(encoding="utf-8"))
        else:
            assert path.suffix == ".safetensors"
            with safe_open(path, framework="pt") as tensors:
                assert list(tensors.keys())


def test_commit_names_every_other_file(trained: Run) -> None:
    place = trained.folder / "step-00000001"
    named = json.loads((place / COMMIT).read_text())["files"]
    assert sorted(named) == sorted(
        str(path.relative_to(place)) for path in files(place) if path.name != COMMIT
    )
    assert {entry["bytes"] for entry in named.values()} == {(place / name).stat().st_size for name in named}


def test_a_folder_without_commit_is_passed_over(folder: Path) -> None:
    (folder / "step-00000002" / COMMIT).unlink()
    step, refused = newest_step(folder)
    assert step == 1
    assert refused == [f"{folder / 'step-00000002'} is no checkpoint: it has no COMMIT.json"]


def test_any_missing_cut_or_changed_file_is_found(folder: Path) -> None:
    place = folder / "step-00000002"
    for path in files(place):
        if path.name == COMMIT:
            continue
        name, data = str(path.relative_to(place)), path.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 128]) + data[middle + 1 :]
        for damaged in (b"", data[:middle], data[:-1], data + b"\n", flipped):
            path.write_bytes(damaged)
            step, refused = newest_step(folder)
            assert step == 1
            assert refused == [f"{place} is no checkpoint: {name} does not match its sha256"]
        path.unlink()
        assert newest_step(folder) == (1, [f"{place} is no checkpoint: {name} is missing"])
        path.write_bytes(data)
    assert newest_step(folder) == (2, [])


def test_a_damaged_commit_never_stops_the_search(folder: Path) -> None:
    path = folder / "step-00000002" / COMMIT
    data = path.read_bytes()
    outcomes = set()
    for place in range(0, len(data), 3):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        step, refused = newest_step(folder)
        outcomes.add((step, len(refused)))
    for place in range(0, len(data), 97):
        path.write_bytes(data[:place])
        outcomes.add((newest_step(folder)[0], 1))
    # A changed digit of a size or of the step number harms nothing; a changed name or hash does.
    assert outcomes == {(1, 1), (2, 0)}


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"files": []}', '{"files": {"a": {}}}', '{"files": {"a": 1}}']
)
def test_a_commit_of_another_shape_is_refused(text: str, folder: Path) -> None:
    (folder / "step-00000002" / "a").write_text("a")
    (folder / "step-00000002" / COMMIT).write_text(text)
    step, refused = newest_step(folder)
    assert step == 1
    assert len(refused) == 1


def test_all_damaged_means_none_and_a_sentence_for_each(folder: Path) -> None:
    for number in (1, 2):
        (folder / f"step-0000000{number}" / "progress.json").unlink()
    step, refused = newest_step(folder)
    assert step is None
    assert [sentence.split()[0][-8:] for sentence in refused] == ["00000002", "00000001"]


def test_another_model_is_refused_in_one_line(trained: Run) -> None:
    engine = Engine(tiny.encoder(num_layers=3), tiny.train(), 1)
    found, _ = checkpoint.newest(str(trained.folder), tiny.STORAGE)
    assert found is not None
    with pytest.raises(RunError, match=r"no parameter model\.bert\.encoder\.layer\.2\."):
        checkpoint.load(engine, found, tiny.STORAGE)


def test_another_size_of_the_model_is_refused_in_one_line(trained: Run) -> None:
    engine = Engine(tiny.encoder(hidden_size=32), tiny.train(), 1)
    found, _ = checkpoint.newest(str(trained.folder), tiny.STORAGE)
    assert found is not None
    with pytest.raises(RunError, match="another model"):
        checkpoint.load(engine, found, tiny.STORAGE)


# Retention


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def more(folder: Path, *steps: int) -> None:
    for step in steps:
        shutil.copytree(folder / "step-00000001", folder / f"step-{step:08d}")


@pytest.mark.parametrize(("keep", "left"), [(1, [9]), (2, [5, 9]), (4, [2, 4, 5, 9]), (9, [1, 2, 4, 5, 9])])
def test_retention_keeps_the_newest(keep: int, left: list[int], folder: Path) -> None:
    more(folder, 4, 5, 9)
    checkpoint.retain(str(folder), keep, tiny.STORAGE)
    assert kept(folder) == left
    checkpoint.retain(str(folder), keep, tiny.STORAGE)
    assert kept(folder) == left


def test_retention_counts_no_folder_without_commit(folder: Path) -> None:
    more(folder, 3, 4)
    (folder / "step-00000004" / COMMIT).unlink()
    (folder / "step-00000002" / COMMIT).unlink()
    checkpoint.retain(str(folder), 2, tiny.STORAGE)
    assert newest_step(folder)[0] == 1  # as 3 and 4 are copies of 1
    assert kept(folder)[:3] in ([1, 2, 3], [1, 3, 4])


def test_retention_of_nothing_good_removes_nothing(folder: Path) -> None:
    for number in (1, 2):
        (folder / f"step-0000000{number}" / COMMIT).unlink()
    checkpoint.retain(str(folder), 1, tiny.STORAGE)
    assert kept(folder) == [1, 2]


def test_retention_never_removes_the_only_good_checkpoint(trained: Run, folder: Path) -> None:
    # A run that fell back from a damaged 2 to 1 and saved again before it came to 2.
    more(folder, 9)
    shutil.rmtree(folder / "step-00000002")
    weights = folder / "step-00000009" / "weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    checkpoint.retain(str(folder), 1, tiny.STORAGE)
    assert newest_step(folder)[0] == 1
    assert_equal(load(folder), trained.state())


# A full disk


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond this many bytes: the write that tries fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_costs_no_checkpoint(trained: Run, folder: Path) -> None:
    run, sizes = trained, sorted({path.stat().st_size for path in files(folder / "step-00000002")})
    whole, run.folder = run.folder, folder
    try:
        for limit in [0, *(size - 1 for size in sizes)]:
            with files_up_to(limit), pytest.raises(RunError) as caught:
                run.save(3)
            message = str(caught.value)
            assert message.startswith(f"{folder / 'step-00000003'} could not be written: ")
            assert "File too large" in message
            assert "\n" not in message
            step, refused = newest_step(folder)
            assert step == 2
            assert len(refused) == (folder / "step-00000003").exists()
        run.save(3)
        assert newest_step(folder) == (3, [])
        assert_equal(load(folder), run.state())
    finally:
        run.folder = whole


def test_a_disk_that_is_full_at_the_tokenizer_costs_no_checkpoint(trained: Run, folder: Path) -> None:
    long = copy.deepcopy(tiny.tokens())
    long.add_tokens(["x" * 300_000])
    export = functools.partial(backbone.export, trained.model, long)
    with files_up_to(250_000), pytest.raises(RunError, match="could not be written: ") as caught:
        checkpoint.save(trained.engine, at(3), "", export, str(folder), tiny.STORAGE)
    assert "\n" not in str(caught.value)
    assert newest_step(folder)[0] == 2


def test_what_a_killed_save_left_is_not_mixed_with_the_next(trained: Run, folder: Path) -> None:
    # Two workers were killed in a save of step 2; the run goes on with one.
    place = folder / "step-00000002"
    (place / COMMIT).unlink()
    (place / "state" / "worker-00000-of-00001.safetensors").rename(
        place / "state" / "worker-00001-of-00002.safetensors"
    )
    run, whole = trained, trained.folder
    run.folder = folder
    try:
        run.save(2)
    finally:
        run.folder = whole
    assert [path.name for path in (place / "state").iterdir()] == ["worker-00000-of-00001.safetensors"]
    assert newest_step(folder) == (2, [])


# A killed process

KILLED_AT = (1, 2, 3, 6, 9, 12, 14, 10_000)
"""Writes at which a save is killed; the last never comes."""


def die_at_write(number: int) -> None:
    """Kills this process, with no chance to clean up, as it begins its n-th removal, copy or move of a file."""
    count = itertools.count(1)

    def guarded(act: Callable[..., Any]) -> Callable[..., Any]:
        def begin(*arguments: Any, **options: Any) -> Any:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **options)

        return begin

    shutil.rmtree = guarded(shutil.rmtree)
    shutil.copyfile = guarded(shutil.copyfile)
    Path.replace = guarded(Path.replace)  # type: ignore[method-assign]


def kill_saves(root: str) -> None:
    """Kills a save at each of `KILLED_AT`, in a child each: what costs is to import, and forks have it behind them."""
    for number in KILLED_AT:
        child = os.fork()
        if child == 0:
            kill_save(Path(root) / f"{number:05d}", number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (0 if number == KILLED_AT[-1] else -signal.SIGKILL), f"write {number}: {code}"


def kill_save(folder: Path, number: int) -> NoReturn:
    """Step 1 is a good checkpoint, step 2 a damaged one; the save that replaces it is killed at its n-th write."""
    run = Run(folder, steps=1)
    run.save(1)
    (run.save(2) / "progress.json").write_text("{")
    die_at_write(number)
    run.save(2)
    os._exit(0)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of saves that were killed at ever later writes; the last came to its end."""
    root = tmp_path_factory.mktemp("killed")
    code = f"from tests.unit.test_checkpoint import kill_saves; kill_saves({str(root)!r})"
    place = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return sorted(root.iterdir())


def test_a_save_killed_at_any_write_leaves_a_good_checkpoint(killed: list[Path]) -> None:
    steps = [newest_step(folder)[0] for folder in killed]
    assert steps[0] == 1
    assert steps[-1] == 2
    assert steps == sorted(steps)  # once the new one is whole, it stays
    for folder, step in zip(killed, steps, strict=True):
        found, refused = checkpoint.newest(str(folder), tiny.STORAGE)
        assert found is not None
        assert len(refused) == (step == 1 and (folder / "step-00000002").exists())


def test_a_killed_save_can_be_resumed_saved_again_and_retained(killed: list[Path], tmp_path: Path) -> None:
    first = load(killed[0])
    run = Run(tmp_path, steps=1)
    assert_equal(first, run.state())
    for folder in killed[:: max(len(killed) // 6, 1)]:
        run.folder = folder
        assert_equal(load(folder), first)
        run.save(2)
        assert newest_step(folder) == (2, [])
        checkpoint.retain(str(folder), 1, tiny.STORAGE)
        assert kept(folder) == [2]
