"""What a run folder remembers: the settings that a resumed run must share with its checkpoint, and when it is over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from mlray import storage
from mlray.config import ConfigError, Contrastive, RunConfig, RunError, Train
from mlray.corpus.manifest import Manifest
from mlray.models import adapters, backbone, freezing, origin
from mlray.models.backbone import Backbone
from mlray.training.checkpoint import Checkpoint, Progress

_FIXED = {
    "run": ("seed",),
    "corpus": (
        "alpha",
        "task_alpha",
        "window_rows",
        "sequence_length",
        "batches",
        "without_tests",
        "curriculum",
        "curriculum_windows",
    ),
    "tokenizer": (),
    "model": (),
    "objective": (),
    "contrastive": tuple(name for name in Contrastive.model_fields if name != "cache"),
    "distillation": (),
    "recommendation": ("candidates",),
    "adapter": (),
    "train": ("freeze_layers", "freeze_embeddings", "early_stopping"),
}
"""Section -> the settings (none named: all) that give the stream's position and the weights their meaning."""


def _drawn_together(config: RunConfig) -> Iterator[str]:
    """The sizes of what a loss compares with each other, or of what the order of the rows depends on."""
    name = config.objective.name
    if name == "contrastive" or config.corpus.batches != "mixed":
        yield "global_batch_size"
    if (name == "distillation" and config.distillation.loss == "similarity") or (
        name == "next_item" and config.recommendation.candidates == "batch"
    ):
        yield "micro_batch_size"


def check(config: RunConfig, found: Checkpoint) -> None:
    """Refuses to go on from a checkpoint that was made with other settings of the stream, model or objective.

    Raises:
        ConfigError: it names the setting and its two values.
    """
    text = storage.read_bytes(storage.join(found.uri, "config.yaml"), config.storage)
    before: dict[str, dict[str, Any]] = yaml.safe_load(text)
    now = config.model_dump(mode="json")
    fixed = {**_FIXED, "train": (*_FIXED["train"], *_drawn_together(config))}
    for section, keys in fixed.items():
        for key in keys or now[section]:
            old = before.get(section, {}).get(key, now[section][key])
            if old != now[section][key]:
                raise ConfigError(
                    f"{section}.{key}={now[section][key]} but {found.uri} was trained with {old}; set it back, choose "
                    "another run.name, or start over with train.resume=false"
                )


def check_corpus(found: Checkpoint, manifest: Manifest) -> None:
    """Refuses to go on in other documents than those that the position of a checkpoint counts.

    Raises:
        ConfigError: a document was changed, added or taken away, or another limit of the corpus moves them.
    """
    if found.progress.corpus != manifest.digest:
        raise ConfigError(
            f"the documents of the corpus, or its limits, are others than {found.uri} was trained on, so its position "
            "means nothing in them; choose another run.name, or start over with train.resume=false"
        )


def vectors(config: RunConfig, found: Checkpoint) -> str | None:
    """The file of the items' vectors that a checkpoint was trained with, by its name in the run folder."""
    saved = yaml.safe_load(storage.read_bytes(storage.join(found.uri, "config.yaml"), config.storage))
    place = saved.get("recommendation", {}).get("vectors")
    return place.rpartition("/")[2] if place else None


def check_backbone(config: RunConfig, found: Checkpoint, model: Backbone) -> None:
    """Refuses to go on when what is not trained, and read from the same place again, is another by now.

    The weights below an adapter, those of the language adapter if there is one, or what `train.freeze_*` keeps.

    Raises:
        ConfigError: it names the two.
    """
    if config.adapter.kind == "none":
        _check_frozen(config, found, model)
        return
    below = config.adapter.language_path
    with storage.local_copy(storage.join(found.uri, "weights"), config.storage) as folder:
        origin.check_backbone(folder, adapters.digest(model))
        if below:
            with storage.local_copy(below, config.storage) as language:
                origin.check_language_below(folder, language)


def _check_frozen(config: RunConfig, found: Checkpoint, model: Backbone) -> None:
    kept = freezing.freeze(model, config.train)
    if not kept:
        return
    with storage.local_copy(storage.join(found.uri, "weights"), config.storage) as folder:
        before = {
            name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
    for name, tensor in backbone.plain_names(model, kept).items():
        if not torch.equal(before.get(name, tensor), tensor):
            raise ConfigError(
                f"{name}, which train.freeze_layers or freeze_embeddings keeps, is another in {config.model.path} than "
                f"in {found.uri}; put the former back, or start over with train.resume=false"
            )


def finished(progress: Progress, config: Train) -> bool:
    """Whether a run has made all its steps or was stopped early."""
    stopped = config.early_stopping is not None and progress.stale >= config.patience
    return stopped or progress.step >= config.steps


def watched(progress: Progress, config: Train) -> float | None:
    """The value of `train.early_stopping`, the lower the better, in the last validation; None if the run has none.

    Raises:
        RunError: the validation made no prediction in the language.
    """
    if config.early_stopping is None:
        return None
    language, metric = config.early_stopping.rsplit(".", 1)
    table = progress.validations[-1]["languages"]
    if language not in table:
        raise RunError(
            f"train.early_stopping={config.early_stopping}: the held-out rows of {language!r} hold nothing to predict; "
            f"the validation has {', '.join(table) or 'no language'}"
        )
    return float(table[language][metric]) * (-1 if metric == "accuracy" else 1)


def should_stop(progress: Progress, config: Train) -> bool:
    """Early stopping on `<language>.<metric>`; keeps its count in the progress, so that a resume goes on counting.

    Raises:
        RunError: as `watched`.
    """
    value = watched(progress, config)
    if value is None:
        return False
    if progress.best is None or value < progress.best:
        progress.best, progress.best_step, progress.stale = value, progress.step, 0
        return False
    progress.stale += 1
    return progress.stale >= config.patience


def tokenizer_fingerprint(config: RunConfig, manifest: Manifest) -> str:
    """Hash of everything that the tokenizer of a run depends on."""
    vectors = config.recommendation.vectors
    items = _sha256(vectors, config) if vectors else None
    source = config.tokenizer.path or config.model.path
    own = storage.join(storage.absolute(source), "tokenizer.json") if source else None
    parts = [
        *([items] if items else []),
        *([_sha256(own, config)] if own and storage.exists(own, config.storage) else []),
        config.tokenizer.model_dump(mode="json"),
        config.model.path,
        config.objective.name,
        manifest.digest,
        config.corpus.alpha,
        config.corpus.window_rows,
        config.run.seed,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(uri: str, config: RunConfig) -> str:
    return hashlib.sha256(storage.read_bytes(uri, config.storage)).hexdigest()
