"""The main job: corpus, tokenizer, plan, training, report; each part is made once and kept in the run folder."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.autoscaler import sdk as autoscaler
from rich.console import Console

from mlray import storage
from mlray.config import ConfigError, RunConfig, RunError
from mlray.corpus import manifest as manifests
from mlray.corpus import sources, stream, validation
from mlray.corpus.manifest import Manifest
from mlray.corpus.windows import WindowReader
from mlray.models import backbone, tokenizer
from mlray.training import checkpoint as checkpoints
from mlray.training import fit, plan, report
from mlray.training.engine import probe_precision

_POLL_S = 2.0


def pretrain(config: RunConfig, *, plan_only: bool = False) -> dict[str, Any]:
    """Runs (or resumes) pre-training, prints plan and result, and returns the report (empty with `plan_only`).

    Raises:
        ConfigError: the configuration cannot run; the sentence says what to change.
        RunError: storage or the workers failed.
    """
    console = Console(width=None if os.environ.get("COLUMNS") else 110)
    folders = fit.Folders.of(config)
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"storage_uri": _parent(folders)})}
    )
    if not config.train.resume and not plan_only:
        storage.delete_folder(folders.checkpoints, config.storage)
    corpus_sources = sources.import_datasets(
        config.corpus.sources, storage.join(folders.root, "imported"), config.storage
    )
    files = sources.list_files(corpus_sources, config.storage)
    connect(config)
    manifest = _manifest(config, folders, files)
    tokens = _tokenizer(config, folders, manifest)
    fertility = tokenizer.fertility(tokens, validation.texts(manifest))
    report.show_fertility(fertility, console)
    model = fit.open_model(config, tokens)
    plan.check(config, backbone.positions(model))
    outline = plan.make(config, manifest, fertility, model, probe_precision(config.train.precision))
    plan.show(outline, manifest.refused_counts(), console)
    if plan_only:
        return {}
    check_placement(config)
    fit.fit(config)
    found, _ = checkpoints.newest(folders.checkpoints, config.storage)
    if found is None:
        raise RunError(f"the workers ended without a checkpoint in {folders.checkpoints}")
    result = report.build(config, found, fertility, manifest.refused_counts())
    report.save(result, folders.root, config)
    report.show(result, console)
    console.print(
        f"checkpoint  {found.uri}\nweights     {result['weights']}\nreport      {folders.root}/report.json"
    )
    return result


def _parent(folders: fit.Folders) -> str:
    return folders.root.rsplit("/", 1)[0]


def connect(config: RunConfig) -> None:
    """Joins the job's cluster, or starts a local one."""
    if not ray.is_initialized():
        ray.init(address=config.cluster.address, logging_level="warning", log_to_driver=True)


def check_placement(config: RunConfig) -> None:
    """Waits `cluster.wait_s` for nodes that can hold the workers.

    Raises:
        ConfigError: the cluster cannot place them.
    """
    wanted = config.cluster
    data = (
        config.corpus.read_cpus + stream.CUT_CPUS
    ) * config.corpus.num_readers + config.corpus.tokenize_cpus
    end = time.monotonic() + wanted.wait_s
    bundle = {"CPU": wanted.cpus_per_worker, "GPU": wanted.gpus_per_worker}
    asked = wanted.wait_s > 0
    if asked:  # nodes that start from zero come only when someone asks for them
        bundles = [{key: value for key, value in bundle.items() if value}] * wanted.num_workers
        autoscaler.request_resources(bundles=bundles)
    try:
        while True:
            fitting, offer = _places(config)
            left = offer["CPU"] - wanted.num_workers * wanted.cpus_per_worker
            if fitting >= wanted.num_workers and left >= data - 1e-9:
                return
            if time.monotonic() >= end:
                break
            time.sleep(_POLL_S)
    finally:
        if asked:  # the request would keep the nodes for ever; from here on the run's own demand does
            autoscaler.request_resources(bundles=[])
    raise ConfigError(
        f"cluster.num_workers={wanted.num_workers} cannot be placed: each needs {wanted.cpus_per_worker:g} CPU and "
        f"{wanted.gpus_per_worker:g} GPU, the input pipeline {data:g} CPU, and the cluster offers {offer['CPU']:g} CPU "
        f"and {offer['GPU']:g} GPU, room for {fitting} workers; lower cluster.num_workers or cluster.cpus_per_worker, "
        "or raise cluster.wait_s where nodes are still to come"
    )


def _places(config: RunConfig) -> tuple[int, dict[str, float]]:
    offer = {"CPU": 0.0, "GPU": 0.0}
    fitting = 0
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = {key: float(node["Resources"].get(key, 0.0)) for key in offer}
        room = resources["CPU"] / config.cluster.cpus_per_worker
        if config.cluster.gpus_per_worker:
            room = min(room, resources["GPU"] / config.cluster.gpus_per_worker)
        fitting += int(room + 1e-9)
        offer = {key: offer[key] + resources[key] for key in offer}
    return fitting, offer


def _manifest(config: RunConfig, folders: fit.Folders, files: list[sources.SourceFile]) -> Manifest:
    fingerprint = manifests.fingerprint(files, config.corpus)
    manifest = manifests.load(folders.corpus, config.storage)
    if manifest is not None and manifest.fingerprint == fingerprint:
        return manifest
    if manifest is not None and storage.list_folders(folders.checkpoints, config.storage):
        raise ConfigError(
            f"the corpus or its limits changed since {folders.root} began, so its position means nothing any more; "
            "choose another run.name, or start over with train.resume=false"
        )
    manifest = stream.build_manifest(files, config.corpus, config.storage, fingerprint)
    manifests.save(manifest, folders.corpus, config.storage)
    return manifest


def _tokenizer(config: RunConfig, folders: fit.Folders, manifest: Manifest) -> Any:
    """The run's own tokenizer if there is one, else the one that is named, else a newly trained one."""
    marker = storage.join(folders.tokenizer, "tokenizer.json")
    if storage.exists(marker, config.storage):
        with storage.local_copy(folders.tokenizer, config.storage) as folder:
            return tokenizer.load(folder)
    path = config.tokenizer.path or config.model.path
    if path:
        with storage.local_copy(path, config.storage) as folder:
            tokens = tokenizer.load(folder)
    else:
        tokens = tokenizer.train(_texts(config, manifest), config.tokenizer)
    with storage.staging() as stage:
        tokens.save_pretrained(str(stage))
        storage.upload(stage, folders.tokenizer, config.storage)
    return tokens


def _texts(config: RunConfig, manifest: Manifest) -> Iterator[str]:
    """The first documents of the mixture, at most once through the corpus."""
    reader = fit.open_reader(config, manifest)
    limit = min(config.tokenizer.train_rows, int(reader.mixture.counts.sum()))
    documents = (
        text
        for number in itertools.count()
        for pair in zip(*_sides(reader, number), strict=True)
        for text in pair
        if text
    )
    return itertools.islice(documents, limit)


def _sides(reader: WindowReader, number: int) -> tuple[list[str], list[str]]:
    window = reader.read(number)
    return window.text, window.pair
