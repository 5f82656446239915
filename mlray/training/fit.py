"""Places the loop on Ray Train workers: what each worker does, and the trainer that keeps them running."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch

from mlray import configuration, storage
from mlray.config import RunConfig, RunError
from mlray.corpus import manifest as manifests
from mlray.corpus import stream, validation
from mlray.corpus.mixture import Mixture
from mlray.corpus.packing import Cutter
from mlray.corpus.windows import WindowReader
from mlray.models import adapters, backbone, freezing, tokenizer
from mlray.objectives.table import OBJECTIVES, Task
from mlray.training import checkpoint as checkpoints
from mlray.training import loop, resume
from mlray.training.checkpoint import Progress
from mlray.training.engine import Engine
from mlray.training.folders import Folders
from mlray.training.monitor import Monitor
from mlray.training.precision import probe_precision, settle

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
_KEPT_BYTES = 1 << 30
_OUR_ERROR = re.compile(r"\b(?:StorageError|RunError|ConfigError): ")


def fit(config: RunConfig) -> None:
    """Runs the loop on `cluster.num_workers` workers until it ends.

    Raises:
        RunError: the workers failed more often than `cluster.max_failures` allows.
    """
    folders = Folders.of(config)
    remote = storage.is_s3(folders.root)
    workers = {"CPU": config.cluster.cpus_per_worker}
    if config.cluster.gpus_per_worker:
        workers["GPU"] = config.cluster.gpus_per_worker
    place = storage.join(folders.root, "ray")
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config=config.model_dump(mode="json"),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if config.cluster.gpus_per_worker else "gloo"
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.cluster.num_workers,
            use_gpu=config.cluster.gpus_per_worker > 0,
            resources_per_worker=workers,
        ),
        datasets={"train": functools.partial(_open_stream, config.model_dump(mode="json"))},
        dataset_config=ray.train.DataConfig(execution_options=stream.execution_options()),
        run_config=ray.train.RunConfig(
            name=f"{config.run.name}-{time.time_ns():x}",
            storage_path=place.removeprefix("s3://"),
            storage_filesystem=storage.filesystem(config.storage) if remote else None,
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
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


def _open_stream(values: dict[str, Any]) -> Any:
    """Builds the stream each time that workers are started: from the newest good checkpoint on."""
    config = configuration.build(values)
    folders = Folders.of(config)
    manifest = _manifest(folders, config)
    reader = open_reader(config, manifest)
    cutter = open_cutter(config, open_tokenizer(config, folders), manifest)
    found, _ = checkpoints.newest(folders.checkpoints, config.storage)
    progress = found.progress if found else Progress()
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


def open_reader(config: RunConfig, manifest: manifests.Manifest) -> WindowReader:
    """The windows of a run."""
    mixture = Mixture.of(manifest, config.corpus, config.run.seed)
    return WindowReader(manifest, mixture, config.corpus.max_chars, config.storage)


def open_tokenizer(config: RunConfig, folders: Folders) -> Any:
    """The tokenizer of a run."""
    with storage.local_copy(folders.tokenizer, config.storage) as folder:
        return tokenizer.load(folder, OBJECTIVES[config.objective.name].special_tokens)


def open_task(config: RunConfig, tokens: Any, manifest: manifests.Manifest) -> Task:
    """What a run learns."""
    return Task(
        config.objective,
        tokenizer.vocabulary(tokens),
        manifest.languages,
        config.run.seed,
        open_labels(config),
        config.contrastive,
        config.distillation,
        OBJECTIVES[config.objective.name].teacher(config),
    )


def open_cutter(config: RunConfig, tokens: Any, manifest: manifests.Manifest) -> Cutter:
    """What cuts the documents of a run.

    Raises:
        ConfigError: the corpus or the tokenizer is none for the objective.
    """
    task = open_task(config, tokens, manifest)
    return task.cutter(tokenizer.encoder(tokens), config.corpus.sequence_length)


def open_labels(config: RunConfig) -> list[str]:
    """The labels of a run; none if the objective has none."""
    place = Folders.of(config).labels
    if not storage.exists(place, config.storage):
        return []
    found: list[str] = json.loads(storage.read_bytes(place, config.storage))
    return found


def _manifest(folders: Folders, config: RunConfig) -> manifests.Manifest:
    manifest = manifests.load(folders.corpus, config.storage)
    if manifest is None:
        raise RunError(f"{folders.corpus} holds no manifest; has the run folder been moved?")
    return manifest


def _work(values: dict[str, Any]) -> None:
    """What every worker runs, from its first line to the last checkpoint."""
    config = configuration.build(values)
    folders = Folders.of(config)
    _prepare_process(config)
    manifest = _manifest(folders, config)
    tokens = open_tokenizer(config, folders)
    task = open_task(config, tokens, manifest)
    cutter = task.cutter(tokenizer.encoder(tokens), config.corpus.sequence_length)
    table = validation.rows(manifest, cutter, config.corpus.sequence_length, config.run.seed)
    held_out = validation.batches(table, config.train.micro_batch_size)
    torch.manual_seed(config.run.seed)
    model = open_model(config, tokens)
    precision = probe_precision(config.train.precision)
    settled = settle(config.train, config.cluster.num_workers, precision)
    export = open_export(config, model, tokens)  # what is trained must be known to the engine
    engine = Engine(model, settled, config.gradient_accumulation_steps, task.over_batch)
    found, refused = checkpoints.newest(folders.checkpoints, config.storage)
    progress = found.progress if found else Progress()
    if found:
        checkpoints.load(engine, found, config.storage)
    monitor = Monitor(config, folders, engine.rank, progress, refused)
    shard = ray.train.get_dataset_shard("train")
    batches = stream.batches(shard, config.train.micro_batch_size, progress.position, engine.rank)
    if not progress.validations:
        monitor.validated(progress, loop.validate(engine, held_out, task))
    for step in loop.steps(engine, batches, task, config.train, start=progress.step, seed=config.run.seed):
        _advance(progress, step, task.languages, config.train.log_every)
        progress.peak_bytes = max(progress.peak_bytes, engine.peak_bytes)
        monitor.stepped(step)
        last = step.number == config.train.steps
        stop = False
        if last or step.number % config.train.validate_every == 0:
            monitor.validated(progress, loop.validate(engine, held_out, task))
            stop = resume.should_stop(progress, config.train)
        best = progress.best_step == step.number
        if last or stop or best or step.number % config.train.checkpoint_every == 0:
            checkpoints.save(engine, progress, config.to_yaml(), export, folders.checkpoints, config.storage)
            if engine.rank == 0:
                kept = config.train.keep_checkpoints
                checkpoints.retain(folders.checkpoints, kept, config.storage, progress.best_step)
            ray.train.report({"step": step.number, "loss": step.loss})
        if stop:
            break
    monitor.close()


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


def open_model(config: RunConfig, tokens: Any) -> Any:
    """The model that a configuration names, fresh or loaded.

    Raises:
        ConfigError: as `backbone.build`.
    """
    build = OBJECTIVES[config.objective.name].build
    if config.model.path is None:
        return build(config, tokens, None, open_labels(config))
    with storage.local_copy(config.model.path, config.storage) as folder:
        return build(config, tokens, folder, open_labels(config))


def open_export(
    config: RunConfig, model: Any, tokens: Any
) -> Callable[[dict[str, torch.Tensor], Path], None]:
    """What writes the result of a run; it also puts the adapter into the model, or freezes a part of it.

    Raises:
        ConfigError: the adapter or `train.freeze_layers` does not fit the model.
    """
    if config.adapter.kind == "none":
        kept = freezing.freeze(model, config.train)
        write = OBJECTIVES[config.objective.name].export
        return lambda weights, folder: write(model, tokens, {**kept, **weights}, folder)
    found = adapters.digest(model)
    with contextlib.ExitStack() as stack:
        place = config.adapter.language_path
        language = stack.enter_context(storage.local_copy(place, config.storage)) if place else None
        wrapped = adapters.add(model, config.adapter, language)
    return functools.partial(adapters.export, wrapped, found, config.objective.name, tokens)


def _advance(progress: Progress, step: loop.Step, languages: list[str], log_every: int) -> None:
    progress.step = step.number
    progress.position = step.position
    progress.seconds += step.seconds
    progress.digest = (progress.digest + step.digest) % (1 << 53)
    for i, name in enumerate(languages):
        progress.tokens[name] = progress.tokens.get(name, 0.0) + float(step.tokens[i])
        progress.documents[name] = progress.documents.get(name, 0.0) + float(step.documents[i])
    if step.number % log_every == 0:
        progress.losses.append((step.number, step.loss, progress.digest))
