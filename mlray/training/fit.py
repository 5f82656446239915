"""Places the loop on Ray Train workers: what each worker does, and the trainer that keeps them running."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch

from mlray import access, configuration, storage
from mlray.config import RunConfig, RunError
from mlray.corpus import manifest as manifests
from mlray.corpus import stream, validation
from mlray.corpus.mixture import Mixture
from mlray.corpus.packing import Cutter
from mlray.models import backbone, tokenizer
from mlray.objectives.table import OBJECTIVES
from mlray.training import checkpoint as checkpoints
from mlray.training import loop, parts, resume
from mlray.training.checkpoint import Progress
from mlray.training.engine import Engine
from mlray.training.folders import Folders
from mlray.training.monitor import Monitor
from mlray.training.precision import probe_precision, settle

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
_KEPT_BYTES = 1 << 30
_ROW_BYTES = 16
"""Of a token of a packed row in the object store, with its target, and some room."""
_OUR_ERROR = re.compile(r"\b(?:StorageError|RunError|ConfigError): ")


@dataclass(frozen=True)
class Shared:
    """What runs that differ in settings alone have in common, in the object store: it is read once."""

    rows: Any = None
    """The packed rows of the stream from its beginning (a materialised dataset)."""
    backbone: Any = None
    """Reference to the files of `model.path`, name -> content."""


ALONE = Shared()


class _Forward(ray.train.UserCallback):  # type: ignore[misc]
    """Puts what the first worker reports into a queue; it runs in Ray Train's controller, a process of its own."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def after_report(self, metrics: list[dict[str, Any]], **_: Any) -> None:
        self._queue.put({**metrics[0], "controller": ray.get_runtime_context().current_actor})


def fit(config: RunConfig, shared: Shared = ALONE, reports: Any = None) -> None:
    """Runs the loop on `cluster.num_workers` workers until it ends.

    Args:
        config: of the run, whose folder holds manifest and tokenizer.
        shared: what need not be read again.
        reports: a queue of Ray that gets each report: `step`, `loss`, `languages` (a validation's scores),
            `checkpoint` (the folder of one that was saved at this step) and `controller` (whom to kill to end the run).

    Raises:
        RunError: the workers failed more often than `cluster.max_failures` allows.
    """
    folders = Folders.of(config)
    remote = access.is_s3(folders.root)
    workers = {"CPU": config.cluster.cpus_per_worker}
    if config.cluster.gpus_per_worker:
        workers["GPU"] = config.cluster.gpus_per_worker
    place = storage.join(folders.root, "ray")
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"config": config.model_dump(mode="json"), "backbone": shared.backbone},
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if config.cluster.gpus_per_worker else "gloo"
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.cluster.num_workers,
            use_gpu=config.cluster.gpus_per_worker > 0,
            resources_per_worker=workers,
        ),
        datasets={"train": functools.partial(_open_stream, config.model_dump(mode="json"), shared.rows)},
        dataset_config=ray.train.DataConfig(execution_options=stream.execution_options()),
        run_config=ray.train.RunConfig(
            name=f"{config.run.name}-{time.time_ns():x}",
            storage_path=place.removeprefix("s3://"),
            storage_filesystem=access.filesystem(config.storage) if remote else None,
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[_Forward(reports)] if reports is not None else [],
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RunError(f"the workers failed: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The message of our own error inside Ray's tracebacks, else their last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if _OUR_ERROR.search(line)]
    if ours:
        return _OUR_ERROR.split(ours[-1], maxsplit=1)[-1]
    return lines[-1] if lines else type(error).__name__


def share(config: RunConfig, *, rows: bool) -> Shared:
    """Reads the backbone of a run once, and with `rows` its stream, for all that have the same.

    Rows that would fill more than a third of the object store are left to each run.
    """
    store = ray.cluster_resources().get("object_store_memory", 0.0)
    wanted = config.train.steps * config.train.global_batch_size * config.corpus.sequence_length * _ROW_BYTES
    shared_rows = None
    if rows and wanted < store / 3:
        values = config.model_dump(mode="json")
        opened = _stream(configuration.build(values), Progress())
        opened.context.execution_options = stream.execution_options()
        shared_rows = opened.materialize()
    backbone_files = None
    if config.model.path and access.is_s3(config.model.path):  # a local folder is one for all already
        with storage.local_copy(config.model.path, config.storage) as folder:
            names = [
                path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()
            ]
            backbone_files = ray.put({name: np.fromfile(folder / name, np.uint8) for name in names})
    return Shared(shared_rows, backbone_files)


def _open_stream(values: dict[str, Any], rows: Any) -> Any:
    """Builds the stream each time that workers are started: from the newest good checkpoint on."""
    config = configuration.build(values)
    found, _ = checkpoints.newest(Folders.of(config).checkpoints, config.storage)
    if rows is not None and found is None:
        return rows
    return _stream(config, found.progress if found else Progress())


def _stream(config: RunConfig, progress: Progress) -> Any:
    folders = Folders.of(config)
    manifest = parts.open_manifest(config)
    reader = parts.open_reader(config, manifest)
    cutter = parts.open_cutter(config, parts.open_tokenizer(config, folders), manifest)
    left = (config.train.steps - progress.step) * config.gradient_accumulation_steps
    deal = stream.Deal.of(config.corpus, config.train.micro_batch_size, config.cluster.num_workers, left)
    rows = left * config.train.micro_batch_size * config.cluster.num_workers + deal.rows_per_round
    per_window = _rows_per_window(config, manifest, reader.mixture, cutter)
    return stream.dataset(
        reader,
        cutter,
        config.corpus,
        start=progress.position,
        num_windows=int(rows / per_window) + 2,
        deal=deal,
        batch_rows=config.train.global_batch_size,
    )


def _rows_per_window(
    config: RunConfig, manifest: manifests.Manifest, mixture: Mixture, cutter: Cutter
) -> float:
    """How many rows a window surely fills: one a pair, else half of what the held-out documents say.

    Windows beyond the last step would be tokenised for nothing, ahead of the training and on its CPUs. Should documents
    be shorter still, the stream ends early, and the restarted workers open the next one from the last checkpoint.
    """
    if OBJECTIVES[config.objective.name].loss is None:
        return config.corpus.window_rows
    table = validation.rows(manifest, cutter, config.corpus.sequence_length, config.run.seed)
    mean_L = validation.tokens_per_document(manifest, table) / 2
    shortest = 3  # tokens of any document
    tokens = float(mixture.proportions @ np.maximum(mean_L, shortest))
    return max(config.corpus.window_rows * tokens / config.corpus.sequence_length, 1.0)


def _work(values: dict[str, Any]) -> None:
    """What every worker runs: it trains from the newest checkpoint on, unless others were lost after the last."""
    config = configuration.build(values["config"])
    found, refused = checkpoints.newest(Folders.of(config).checkpoints, config.storage)
    if not (found and resume.finished(found.progress, config.train)):
        _prepare_process(config)
        _train(config, values["backbone"], found, refused)


def _train(config: RunConfig, shared: Any, found: checkpoints.Checkpoint | None, refused: list[str]) -> None:
    """Opens the parts of the run and trains to the last checkpoint."""
    folders, manifest = Folders.of(config), parts.open_manifest(config)
    progress = found.progress if found else Progress(corpus=manifest.digest)
    tokens = parts.open_tokenizer(config, folders)
    task = parts.open_task(config, tokens, manifest)
    cutter = task.cutter(tokenizer.encoder(tokens), config.corpus.sequence_length)
    table = validation.rows(manifest, cutter, config.corpus.sequence_length, config.run.seed)
    held_out = validation.batches(table, config.train.micro_batch_size)
    torch.manual_seed(config.run.seed)
    model = parts.open_model(config, tokens, shared)
    precision = probe_precision(config.train.precision)
    settled = settle(config.train, config.cluster.num_workers, precision)
    export = parts.open_export(config, model, tokens)  # what is trained must be known to the engine
    engine = Engine(model, settled, config.gradient_accumulation_steps, task.over_batch)
    if found:
        checkpoints.load(engine, found, config.storage)
    monitor = Monitor(config, folders, engine.rank, progress, refused)
    shard = ray.train.get_dataset_shard("train")
    batches = stream.batches(shard, config.train.micro_batch_size, progress.position, engine.rank)
    if not progress.validations:
        monitor.validated(progress, loop.validate(engine, held_out, task))
        resume.watched(progress, config.train)  # what is missing is told before the training
    for step in loop.steps(engine, batches, task, config.train, start=progress.step, seed=config.run.seed):
        _advance(progress, step, task.languages, config.train.log_every)
        progress.peak_bytes = max(progress.peak_bytes, engine.peak_bytes)
        monitor.stepped(step)
        last = step.number == config.train.steps
        stop, scores = False, {}
        if last or step.number % config.train.validate_every == 0:
            scores = loop.validate(engine, held_out, task)
            monitor.validated(progress, scores)
            stop = resume.should_stop(progress, config.train)
        best = progress.best_step == step.number
        saved = ""
        if last or stop or best or step.number % config.train.checkpoint_every == 0:
            saved = _save(engine, progress, config, export)
        if scores or saved:
            told = {"step": step.number, "loss": step.loss, "languages": scores, "checkpoint": saved}
            ray.train.report(told)
        if stop:
            break
    monitor.close()


def _save(engine: Engine, progress: Progress, config: RunConfig, export: Callable[..., None]) -> str:
    folder, settings = Folders.of(config).checkpoints, config.storage
    place = checkpoints.save(engine, progress, config.to_yaml(), export, folder, settings)
    if engine.rank == 0:
        checkpoints.retain(folder, config.train.keep_checkpoints, settings, progress.best_step)
    return place


def _prepare_process(config: RunConfig) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    backbone.quiet()
    if not config.cluster.gpus_per_worker:
        torch.set_num_threads(config.cluster.threads_per_worker)
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one.

    By default each large tensor is mapped anew, and the kernel clears its pages again: a seventh of a step on a CPU
    (`benchmarks/cpu_workers.py`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(parameter, _KEPT_BYTES)


def _advance(progress: Progress, step: loop.Step, languages: list[str], log_every: int) -> None:
    progress.step = step.number
    progress.position = step.position
    progress.seconds += step.seconds
    progress.together += step.together
    progress.digest = (progress.digest + step.digest) % (1 << 53)
    for i, name in enumerate(languages):
        progress.tokens[name] = progress.tokens.get(name, 0.0) + float(step.tokens[i])
        progress.documents[name] = progress.documents.get(name, 0.0) + float(step.documents[i])
    if step.number % log_every == 0:
        progress.losses.append((step.number, step.loss, progress.digest))
