"""A bundle: all that one model needs to be served, and the report that it is judged by.

weights/            the model, or the backbone below an adapter, with its tokenizer: an encoder of texts, and beside it
                    the companions; or a recommender or translator that is served alone
adapter/            the adapter of the task, where the run has trained one; language_adapter/ the one below it
adapters/<tag>/     adapters of single markets, see `markets`
recommender/, translator/, writer/    see `companions`
labels.json         of a model with heads for labels
config.yaml         the whole configuration of the run
report.json         the evaluation, and predictions.jsonl, the rows behind it (for paired tests)
BUNDLE.json         sha256 of every file, and what the bundle is
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlray import configuration, storage
from mlray.config import ConfigError, RunConfig, Storage
from mlray.corpus import vectors
from mlray.evaluation.report import Report
from mlray.models import adapters, origin, tokenizer
from mlray.models.embedder import checkpoint_of
from mlray.objectives.embedding import TextEmbedder
from mlray.objectives.recommending import NextItem
from mlray.objectives.table import OBJECTIVES
from mlray.release import companions, evaluations, markets
from mlray.release.registry import Registry
from mlray.training import checkpoint as checkpoints
from mlray.training.folders import WINNER, Folders


@dataclass(frozen=True)
class _Run:
    """A run that has ended and was judged."""

    folders: Folders
    config: RunConfig
    step: str
    weights: str
    evaluation: str
    report: Report


@dataclass(frozen=True)
class Beside:
    """The runs, or sweeps, whose models come into a bundle with that of another."""

    markets: Mapping[str, str] = field(default_factory=dict)
    """Market -> the run whose adapter reads what is found there; see `markets`."""
    companions: Mapping[str, str] = field(default_factory=dict)
    """Name -> the run of a model; see `companions`."""
    sessions: Mapping[str, str] = field(default_factory=dict)
    """Market -> the run whose adapter the recommender reads sessions with there."""


ALONE = Beside()


def make(run_uri: str, registry: Registry, beside: Beside = ALONE) -> str:
    """Makes a bundle of what a run, or the winner of a sweep, has left; the same run gives the same bundle.

    Args:
        run_uri: folder of the run or sweep.
        registry: where the bundle is kept.
        beside: what else it holds.

    Returns:
        Its name.

    Raises:
        ConfigError: there is no run, no checkpoint, or no evaluation of the newest one; or a market's adapter does not
            fit the weights, or was not judged on its market.
        RunError: storage failed.
    """
    settings = registry.settings
    run = _run(run_uri, settings)
    with storage.staging() as stage:
        for place, part in _parts(run.config, run.weights):
            _copy(place, stage / part, settings)
        _copy_judged(
            run, stage, stage / ("weights" if run.config.adapter.kind == "none" else "adapter"), settings
        )
        if storage.exists(run.folders.labels, settings):
            (stage / Path(run.folders.labels).name).write_bytes(
                storage.read_bytes(run.folders.labels, settings)
            )
        (stage / "config.yaml").write_text(run.config.to_yaml(), encoding="utf-8")
        if run.config.adapter.kind != "none":
            _check_backbone(stage, run.config)
        if beside.markets:
            _add_markets(stage, beside.markets, settings)
        others = {name: _run(uri, settings) for name, uri in beside.companions.items()}
        for name, one in others.items():
            _add_companion(stage, name, one, settings)
        for market, uri in beside.sessions.items():
            _add_recommender(stage, market, _run(uri, settings), settings)
        report = Report.read(stage)
        about = _about(run, report) | ({"adapters": sorted(beside.markets)} if beside.markets else {})
        about |= {name: one.config.run.name for name, one in others.items()}
        # That of a sweep, not of its trial.
        return registry.put("bundles", stage, run_uri.rstrip("/").rpartition("/")[2], about)


def _run(uri: str, settings: Storage) -> _Run:
    uri = _winner(storage.absolute(uri), settings)
    config, folders = _config(uri, settings), Folders(uri)
    step, weights, trained_on = _trained(folders, settings)
    # Each of them has a cell wherever the bundle is judged again.
    named = config.corpus.model_copy(update={"languages": trained_on})
    config = config.model_copy(update={"corpus": named})
    judged = storage.join(folders.root, "evaluation")
    missing = f"the run was never evaluated: jobs/evaluate.py --output {judged}"
    return _Run(folders, config, step, weights, judged, evaluations.read(judged, settings, missing))


def _copy(place: str, target: Path, settings: Storage) -> None:
    with storage.local_copy(place, settings) as folder:
        if not folder.is_dir():
            raise ConfigError(
                f"{place} is no folder; a bundle holds all that it needs, so copy it to one first"
            )
        storage.upload(folder, str(target), settings)


def _copy_judged(run: _Run, target: Path, part: Path, settings: Storage) -> None:
    """Copies the evaluation of a run, which must be that of the weights at `part`."""
    if not evaluations.is_of(run.report, part):
        raise ConfigError(
            f"the evaluation of {run.folders.root} is of other weights than those of {run.step}, which the run has "
            "chosen; evaluate them"
        )
    evaluations.copy(run.evaluation, target, settings)


def _check_backbone(stage: Path, config: RunConfig) -> None:
    """Refuses an adapter whose backbone is not any more what it was trained on."""
    weights, labels = stage / "weights", stage / "labels.json"
    row = OBJECTIVES[config.objective.name]
    names = json.loads(labels.read_text(encoding="utf-8")) if labels.is_file() else []
    model = row.build(config, tokenizer.load(weights, row.special_tokens), weights, names)
    origin.check_backbone(stage / "adapter", adapters.digest(model))


def _add_markets(stage: Path, uris: Mapping[str, str], settings: Storage) -> None:
    encoder = _open(stage, "cpu")
    for tag, uri in uris.items():
        run, target = _run(uri, settings), stage / markets.FOLDER / tag
        _copy(run.weights, target, settings)
        encoder.load(tag, target)  # refuses what does not fit
        with storage.staging() as judged:
            _copy_judged(run, judged, target, settings)
            evaluations.take_over(stage, tag, judged, uris)


def _add_companion(stage: Path, name: str, run: _Run, settings: Storage) -> None:
    with storage.staging() as judged, storage.local_copy(run.weights, settings) as weights:
        _copy_judged(run, judged, weights, settings)
        companions.add(stage, name, run.config, weights, judged)


def _add_recommender(stage: Path, market: str, run: _Run, settings: Storage) -> None:
    with storage.staging() as judged, storage.local_copy(run.weights, settings) as adapter:
        _copy_judged(run, judged, adapter, settings)
        companions.add_market(stage, market, adapter, judged)


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


def _trained(folders: Folders, settings: Storage) -> tuple[str, str, tuple[str, ...]]:
    """The step whose weights a run has chosen, where they lie, and the languages that it was trained on.

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
    return step, storage.join(chosen, "weights"), tuple(told["documents"])


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


def _about(run: _Run, report: Report) -> dict[str, Any]:
    return {
        "run": run.config.run.name,
        "objective": run.config.objective.name,
        "family": run.config.model.family,
        "adapter": run.config.adapter.kind,
        "step": run.step,
        "seed": run.config.run.seed,
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
    return _opened(registry, name, device, ())


def open_reader(registry: Registry, name: str, device: str = "cpu", *, adapted: bool = True) -> vectors.Read:
    """The encoder of a bundle, with the adapters of all its markets, as `markets.both`, or (not `adapted`) with none.

    Of a bundle that is a recommender alone what it has learnt of the items, which are read by their ids.

    Raises:
        ConfigError: there is no bundle of this name, or it makes no vectors.
    """
    about = registry.about("bundles", name)
    if adapted and companions.alone(about) == "recommender":
        recommender: NextItem = companions.open_companion(registry, name, "recommender", device)
        return lambda items, _: recommender.vectors(items)
    known = markets.tags(about) if adapted else []
    embedder = _opened(registry, name, device, known)
    return markets.both(embedder, known) if known else markets.plain(embedder)


def _opened(registry: Registry, name: str, device: str, tags: Sequence[str]) -> TextEmbedder:
    about = registry.about("bundles", name)
    if about["objective"] not in {"contrastive", "distillation"}:
        raise ConfigError(
            f"{name} is of objective.name={about['objective']}, which makes no vectors of texts"
        )
    with storage.local_copy(registry.place("bundles", name), registry.settings) as folder:
        found = _open(folder, device)
        for tag in tags:
            found.load(tag, folder / markets.FOLDER / tag)
        return found


def place_of(registry: Registry, name: str, tag: str) -> str:
    """The folder of a market's adapter in a bundle."""
    return storage.join(registry.place("bundles", name), markets.FOLDER, tag)


def _open(folder: Path, device: str) -> TextEmbedder:
    """The encoder in a local folder."""
    config = configuration.load(folder / "config.yaml")
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
    report = evaluations.read(place, registry.settings, "the bundle is damaged")
    return report, storage.join(place, evaluations.ROWS)
