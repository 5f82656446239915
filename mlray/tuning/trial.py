"""One trial: a Ray Train run with settings of its own, on a corpus and a backbone that all trials share.

A trial is a driver that places its workers like any run, so its folder is a run's folder: it resumes, and its weights
can be served. Reports reach the driver through a queue, because Ray Train's controller is a process of its own. With
each comes a pointer to the newest checkpoint, a few bytes of JSON, by which Ray Tune clones one trial from another.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.queue import Empty, Queue

from mlray import configuration, storage
from mlray.config import RunConfig, RunError
from mlray.training import checkpoint as checkpoints
from mlray.training import fit
from mlray.training.fit import Shared
from mlray.training.folders import Folders
from mlray.tuning import objective
from mlray.tuning.board import Board

TRIALS = "trials.json"
"""What is known of all trials, below the folder of the sweep."""
_POINTER = "checkpoint.json"
_DONOR = "CLONED_FROM"
_CLONE = "-clone"
_POLL_S = 0.5
_CONTROLLER_S = "0.25"
"""Between two looks of Ray Train's controller at its workers: a report waits for the next one."""
_ENDS_S = "600"
"""In which a trial that was stopped must have ended its training, so that the next one may have its process."""


def run(values: dict[str, Any], base: dict[str, Any], languages: list[str], shared: Shared) -> None:
    """Trains with `values` and reports each validation to Ray Tune.

    Args:
        values: key of the configuration -> value, as Ray Tune has chosen.
        base: the configuration of the run that made the corpus and the tokenizer.
        languages: that must be validated.
        shared: what was read once.

    Raises:
        RunError: the workers failed, or a language is missing.
        ConfigError: the values do not fit each other.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _CONTROLLER_S)
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", _ENDS_S)
    prepared, name = configuration.build(base), tune.get_context().get_trial_id()
    if ended := _ended(prepared, name):  # Ray Tune was killed before it knew
        tune.report(ended)
        return
    config, donor = _placed(prepared, values, name, _told(tune.get_checkpoint()))
    # Ray Tune ends a trial inside of `tune.report`: its training has to end too.
    with contextlib.closing(_reports(config, shared)) as reports:
        for told in reports:
            if not told["languages"]:
                continue
            found = objective.score(told["languages"], languages, config.sweep)
            _report(
                {
                    **{name: told[name] for name in ("step", "loss", "languages", "checkpoint")},
                    "objective": found.objective,
                    "macro": found.macro,
                    "worst": found.worst,
                    "worst_language": found.worst_language,
                    "below_floor": list(found.below),
                    "cloned_from": donor,
                    "run": config.run.name,
                    "values": values,
                }
            )


def _report(result: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pointer = None
        if result["checkpoint"]:
            place = Path(folder) / _POINTER
            place.write_text(json.dumps({"uri": result["checkpoint"]}), encoding="utf-8")
            pointer = tune.Checkpoint.from_directory(folder)
        tune.report(result, checkpoint=pointer)


def configured(base: RunConfig, values: dict[str, Any], name: str) -> RunConfig:
    """The configuration of the trial of a name; its folder lies beside that of the run which made the parts."""
    return configuration.change(base, {**values, "run.name": name})


def _copy_parts(base: RunConfig, config: RunConfig) -> None:
    """Gives a trial what all share (corpus, tokenizer, labels, items), so that its folder is whole by itself."""
    source, target = Folders.of(base), Folders.of(config)
    for place, wanted in ((source.corpus, target.corpus), (source.tokenizer, target.tokenizer)):
        with storage.local_copy(place, config.storage) as folder:
            storage.upload(folder, wanted, config.storage)
    files = [(source.labels, target.labels), (source.frequencies, target.frequencies)]
    if vectors := base.recommendation.vectors:
        files.append((vectors, storage.join(target.root, vectors.rpartition("/")[2])))
    for place, wanted in files:
        if storage.exists(place, config.storage) and not storage.exists(wanted, config.storage):
            storage.write_bytes(wanted, storage.read_bytes(place, config.storage), config.storage)
    storage.write_bytes(storage.join(target.root, "config.yaml"), config.to_yaml().encode(), config.storage)


def _ended(base: RunConfig, name: str) -> dict[str, Any] | None:
    """The last report of a trial that has ended before the sweep was resumed; None for any other."""
    place = storage.join(base.run.storage_uri, TRIALS)
    if not storage.exists(place, base.storage):
        return None
    board = Board(base.run.name, base, ())
    board.restore(json.loads(storage.read_bytes(place, base.storage)))
    return board.report(name)


def last(config: RunConfig) -> dict[str, Any] | None:
    """The last validation of a run, as its workers told it; None if it has made none."""
    found, _ = checkpoints.newest(Folders.of(config).checkpoints, config.storage)
    if found is None or not found.progress.validations:
        return None
    last, losses = found.progress.validations[-1], found.progress.losses
    loss = losses[-1][1] if losses else 0.0
    return {"step": last["step"], "loss": loss, "languages": last["languages"], "checkpoint": found.uri}


def _told(pointer: Any) -> str:
    """The checkpoint that Ray Tune points at; empty for none."""
    if pointer is None:
        return ""
    with pointer.as_directory() as folder:
        return str(json.loads((Path(folder) / _POINTER).read_text(encoding="utf-8"))["uri"])


def _placed(base: RunConfig, values: dict[str, Any], name: str, pointer: str) -> tuple[RunConfig, str]:
    """The run in which a trial goes on, and the checkpoint of another trial that it has taken over, if any.

    A trial's own folder goes on from its newest checkpoint. A clone gets a new folder with a copy of its donor's:
    workers of the old one may still be writing there, and others may be cloned from it.

    Raises:
        RunError: the donor's checkpoint is not whole.
    """
    settings, root = base.storage, base.run.storage_uri
    run = pointer.rsplit("/", 3)[-3] if pointer else name
    cloned = run != name and not run.startswith(f"{name}{_CLONE}")
    if cloned:
        if fault := checkpoints.verify(pointer, settings):
            raise RunError(f"{pointer} is no checkpoint to go on from: {fault}")
        taken = set(storage.list_folders(root, settings))
        run = next(one for n in itertools.count(1) if (one := f"{name}{_CLONE}{n}") not in taken)
    config = configured(base, values, run)
    _copy_parts(base, config)
    mark = storage.join(Folders.of(config).root, _DONOR)
    if cloned:
        target = storage.join(Folders.of(config).checkpoints, pointer.rsplit("/", 1)[-1])
        with storage.local_copy(pointer, settings) as folder:
            storage.upload(folder, target, settings)
        storage.write_bytes(mark, pointer.encode(), settings)
    donor = storage.read_bytes(mark, settings).decode() if storage.exists(mark, settings) else ""
    return config, donor


def _reports(config: RunConfig, shared: Shared) -> Generator[dict[str, Any]]:
    """What a run reports, while it runs; whoever closes this ends the run."""
    queue, faults = Queue(actor_options={"num_cpus": 0}), list[BaseException]()

    def work() -> None:
        try:
            fit.fit(config, shared, queue)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work, daemon=True)  # a trial that is killed takes it along
    thread.start()
    heard, controller = False, None
    try:
        while thread.is_alive() or not queue.empty():
            try:
                told = queue.get(timeout=_POLL_S)
            except Empty:
                continue
            controller = told.pop("controller")
            heard = heard or bool(told["languages"])
            yield told
    finally:
        if thread.is_alive() and controller is not None:
            ray.kill(controller)  # and its workers with it
            thread.join()
        queue.shutdown(force=True)
    if faults:
        raise faults[0]
    # It had nothing left to do: its report was lost with who should hear it.
    if not heard and (told := last(config)):
        yield told
