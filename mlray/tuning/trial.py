"""One trial: a Ray Train run with settings of its own, on a corpus and a backbone that all trials share.

A trial is a driver that places its workers like any run, so its folder is a run's folder: it resumes, and its weights
can be served. Reports reach the driver through a queue, because Ray Train's controller is a process of its own. With
each comes a pointer to the newest checkpoint, a few bytes of JSON, by which Ray Tune clones one trial from another.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray import tune
from ray.util.queue import Empty, Queue

from mlray import configuration, storage
from mlray.config import RunConfig, RunError
from mlray.training import checkpoint as checkpoints
from mlray.training import fit
from mlray.training.fit import Shared
from mlray.training.folders import Folders
from mlray.tuning import objective

_POINTER = "checkpoint.json"
_POLL_S = 0.5
_CONTROLLER_S = "0.25"
"""Between two looks of Ray Train's controller at its workers: a report waits for the next one."""


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
    prepared = configuration.build(base)
    config = configured(prepared, values, tune.get_context().get_trial_id())
    _copy_parts(prepared, config)
    donor = _adopt(config, tune.get_checkpoint())
    for told in _reports(config, shared):
        if not told["languages"]:
            continue
        found = objective.score(told["languages"], languages, config.sweep)
        result = {
            **{name: told[name] for name in ("step", "loss", "languages", "checkpoint")},
            "objective": found.objective,
            "macro": found.macro,
            "worst": found.worst,
            "worst_language": found.worst_language,
            "below_floor": list(found.below),
            "cloned_from": donor,
        }
        with tempfile.TemporaryDirectory() as folder:
            pointer = None
            if told["checkpoint"]:
                (Path(folder) / _POINTER).write_text(
                    json.dumps({"uri": told["checkpoint"]}), encoding="utf-8"
                )
                pointer = tune.Checkpoint.from_directory(folder)
            tune.report(result, checkpoint=pointer)


def configured(base: RunConfig, values: dict[str, Any], name: str) -> RunConfig:
    """The configuration of the trial of a name; its folder lies beside that of the run which made the parts."""
    return configuration.change(base, {**values, "run.name": name})


def _copy_parts(base: RunConfig, config: RunConfig) -> None:
    """Gives a trial the manifest, tokenizer and labels that all share, so that its folder is whole by itself."""
    source, target = Folders.of(base), Folders.of(config)
    for place, wanted in ((source.corpus, target.corpus), (source.tokenizer, target.tokenizer)):
        with storage.local_copy(place, config.storage) as folder:
            storage.upload(folder, wanted, config.storage)
    if storage.exists(source.labels, config.storage):
        storage.write_bytes(target.labels, storage.read_bytes(source.labels, config.storage), config.storage)
    storage.write_bytes(storage.join(target.root, "config.yaml"), config.to_yaml().encode(), config.storage)


def _adopt(config: RunConfig, pointer: Any) -> str:
    """Takes over the checkpoint that Ray Tune names: another trial's, which is returned, or an own one before others.

    Raises:
        RunError: the checkpoint is not whole.
    """
    if pointer is None:
        return ""
    with pointer.as_directory() as folder:
        donor = json.loads((Path(folder) / _POINTER).read_text(encoding="utf-8"))["uri"]
    own, settings = Folders.of(config).checkpoints, config.storage
    target = storage.join(own, donor.rsplit("/", 1)[-1])
    if fault := checkpoints.verify(donor, settings):
        raise RunError(f"{donor} is no checkpoint to go on from: {fault}")
    if donor != target:
        storage.delete_folder(own, settings)
        with storage.local_copy(donor, settings) as folder:
            storage.upload(folder, target, settings)
    for name in storage.list_folders(own, settings):
        if storage.join(own, name) > target:
            storage.delete_folder(storage.join(own, name), settings)
    return "" if donor == target else donor


def _reports(config: RunConfig, shared: Shared) -> Iterator[dict[str, Any]]:
    """What a run reports, while it runs."""
    queue, faults = Queue(actor_options={"num_cpus": 0}), list[BaseException]()

    def work() -> None:
        try:
            fit.fit(config, shared, queue)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work, daemon=True)  # a trial that is stopped takes it along
    thread.start()
    while thread.is_alive() or not queue.empty():
        try:
            yield queue.get(timeout=_POLL_S)
        except Empty:
            continue
    if faults:
        raise faults[0]
