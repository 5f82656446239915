"""A bundle: all that one model needs to be served, and the report that it is judged by.

weights/            the model, or the backbone below an adapter, with its tokenizer
adapter/            the adapter of the task, where the run has trained one; language_adapter/ the one below it
labels.json         of a model with heads for labels
config.yaml         the whole configuration of the run
report.json         the evaluation, and predictions.jsonl, the rows behind it (for paired tests)
BUNDLE.json         sha256 of every file, and what the bundle is
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlray import configuration, seal, storage
from mlray.config import ConfigError, RunConfig, Storage
from mlray.evaluation.report import Report
from mlray.models.embedder import checkpoint_of
from mlray.objectives.embedding import TextEmbedder
from mlray.release.registry import Registry
from mlray.training import checkpoint as checkpoints
from mlray.training.folders import WINNER, Folders

_JUDGED = ("report.json", "predictions.jsonl")


def make(run_uri: str, registry: Registry) -> str:
    """Makes a bundle of what a run, or the winner of a sweep, has left; the same run gives the same bundle.

    Returns:
        Its name.

    Raises:
        ConfigError: there is no run, no checkpoint, or no evaluation of the newest one.
        RunError: storage failed.
    """
    settings = registry.settings
    name = run_uri.rstrip("/").rpartition("/")[2]  # that of a sweep, not of its trial
    run_uri = _winner(storage.absolute(run_uri), settings)
    config, folders = _config(run_uri, settings), Folders(run_uri)
    step, weights = _trained(folders, settings)
    report = _report(folders, settings)
    with storage.staging() as stage:
        for place, name in _parts(config, weights):
            with storage.local_copy(place, settings) as folder:
                if not folder.is_dir():
                    raise ConfigError(
                        f"{place} is no folder; a bundle holds all that it needs, so copy it to one first"
                    )
                storage.upload(folder, str(stage / name), settings)
        judged_part = stage / ("weights" if config.adapter.kind == "none" else "adapter")
        if report.about.get("sha256") != seal.digest(judged_part):
            raise ConfigError(
                f"the evaluation of {folders.root} is of other weights than those of {step}, which the run has chosen; "
                "evaluate them"
            )
        judged = [storage.join(folders.root, "evaluation", name) for name in _JUDGED]
        kept = [folders.labels] if storage.exists(folders.labels, settings) else []
        for place in (*judged, *kept):
            (stage / Path(place).name).write_bytes(storage.read_bytes(place, settings))
        (stage / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        return registry.put("bundles", stage, name, _about(config, report, step))


def _winner(uri: str, settings: Storage) -> str:
    """The run at a place, or the one that has won if a sweep lies there."""
    place = storage.join(uri, WINNER)
    if not storage.exists(place, settings):
        return uri
    return storage.join(uri, str(json.loads(storage.read_bytes(place, settings))["run"]))


def _config(run_uri: str, settings: Storage) -> RunConfig:
    place = storage.join(run_uri, "config.yaml")
    if not storage.exists(place, settings):
        raise ConfigError(f"{place} is not there; name the folder of a run")
    return configuration.parse(storage.read_bytes(place, settings).decode(), place)


def _trained(folders: Folders, settings: Storage) -> tuple[str, str]:
    """The step whose weights a run has chosen, and where they lie.

    Raises:
        ConfigError: the run has not ended, or its checkpoint is not whole.
    """
    place = storage.join(folders.root, "report.json")
    if not storage.exists(place, settings):
        raise ConfigError(f"{place} is not there; the run has not ended")
    told: dict[str, Any] = json.loads(storage.read_bytes(place, settings))
    step = told["weights"].rstrip("/").split("/")[-2]
    chosen = storage.join(folders.checkpoints, step)
    if fault := checkpoints.verify(chosen, settings):
        raise ConfigError(f"{chosen} is no checkpoint: {fault}")
    return step, storage.join(chosen, "weights")


def _report(folders: Folders, settings: Storage) -> Report:
    folder = storage.join(folders.root, "evaluation")
    for name in _JUDGED:
        if not storage.exists(storage.join(folder, name), settings):
            raise ConfigError(
                f"{folders.root} was never evaluated: {name} is not in {folder}; jobs/evaluate.py --output {folder}"
            )
    return Report.from_json(storage.read_bytes(storage.join(folder, "report.json"), settings).decode())


def _parts(config: RunConfig, weights: str) -> list[tuple[str, str]]:
    """The folders that are copied, and what they are called in the bundle."""
    if config.adapter.kind == "none":
        return [(weights, "weights")]
    assert config.model.path is not None, "an adapter without a backbone passed the checks of a configuration"
    below = config.adapter.language_path
    return [
        (config.model.path, "weights"),
        (weights, "adapter"),
        *([(below, "language_adapter")] if below else []),
    ]


def _about(config: RunConfig, report: Report, step: str) -> dict[str, Any]:
    return {
        "run": config.run.name,
        "objective": config.objective.name,
        "family": config.model.family,
        "adapter": config.adapter.kind,
        "step": step,
        "seed": config.run.seed,
        "languages": {task: sorted(table) for task, table in report.cells.items()},
        "means": {
            task: {name: cell["macro"] for name, cell in report.summary(task).items()}
            for task in report.cells
        },
    }


def open_embedder(registry: Registry, name: str, device: str = "cpu") -> TextEmbedder:
    """The encoder of a bundle, with its adapter, as it was judged.

    Raises:
        ConfigError: there is no bundle of this name, or it makes no vectors of texts.
    """
    about = registry.about("bundles", name)
    if about["objective"] not in {"contrastive", "distillation"}:
        raise ConfigError(
            f"{name} is of objective.name={about['objective']}, which makes no vectors of texts"
        )
    with storage.local_copy(registry.place("bundles", name), registry.settings) as folder:
        config = configuration.parse(
            (folder / "config.yaml").read_text(encoding="utf-8"), f"{name}/config.yaml"
        )
        weights = folder / "weights"
        known = checkpoint_of(config.model, str(weights), Storage())
        adapter, language = (
            folder / part if (folder / part).is_dir() else None for part in ("adapter", "language_adapter")
        )
        return TextEmbedder(config.model_copy(update={"model": known}), weights, adapter, language, device)


def report_of(registry: Registry, name: str) -> tuple[Report, str]:
    """The report of a bundle, and where its predictions lie.

    Raises:
        ConfigError: there is no bundle of this name.
    """
    registry.about("bundles", name)
    place = registry.place("bundles", name)
    body = storage.read_bytes(storage.join(place, "report.json"), registry.settings).decode()
    return Report.from_json(body), storage.join(place, "predictions.jsonl")
