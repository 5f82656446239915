"""Opens the parts of a run as its folder and configuration name them, on the driver and in every worker alike."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from mlray import storage
from mlray.config import RunConfig, RunError
from mlray.corpus import manifest as manifests
from mlray.corpus.mixture import Mixture
from mlray.corpus.packing import Cutter
from mlray.corpus.windows import WindowReader
from mlray.models import adapters, embedder, freezing, origin, tokenizer
from mlray.objectives.table import OBJECTIVES, Task
from mlray.training import contents
from mlray.training.folders import Folders


def open_manifest(config: RunConfig) -> manifests.Manifest:
    """The manifest of a run.

    Raises:
        RunError: there is none.
    """
    folders = Folders.of(config)
    found = manifests.load(folders.corpus, config.storage)
    if found is None:
        raise RunError(f"{folders.corpus} holds no manifest; has the run folder been moved?")
    return found


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
        config.recommendation,
        contents.open_frequencies(config),
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


def open_model(config: RunConfig, tokens: Any, shared: Any = None) -> Any:
    """The model that a configuration names, fresh or loaded.

    Args:
        config: of the run.
        tokens: its tokenizer.
        shared: reference to the files of `model.path`, where they lie in the object store.

    Raises:
        ConfigError: as `backbone.build`.
    """
    build = OBJECTIVES[config.objective.name].build
    if config.model.path is None:
        return build(config, tokens, None, open_labels(config))
    with contextlib.ExitStack() as stack:
        if shared is None:
            folder = stack.enter_context(storage.local_copy(config.model.path, config.storage))
        else:
            folder = stack.enter_context(storage.staging())
            for name, content in ray.get(shared).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                content.tofile(folder / name)
        model = build(config, tokens, folder, open_labels(config))
        if config.adapter.kind != "none":
            embedder.check_pooling(model, folder)
        return model


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
        below = origin.language_digest(language) if language else None
    return functools.partial(
        adapters.export, wrapped, found, config.objective.name, tokens, language_digest=below
    )
