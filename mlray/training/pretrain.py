"""The main job: corpus, tokenizer, plan, training, report; each part is made once and kept in the run folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mlray import storage
from mlray.config import Adapter, ConfigError, RunConfig, RunError
from mlray.corpus import manifest as manifests
from mlray.corpus import sources, stream, validation
from mlray.corpus.manifest import Manifest
from mlray.corpus.windows import WindowReader
from mlray.models import backbone, embedder, items, tokenizer
from mlray.models.fertility import measure_fertility
from mlray.objectives.checks import check_family, check_places, check_positions, check_sources, guarded
from mlray.objectives.table import OBJECTIVES
from mlray.schema import SEPARATOR
from mlray.training import checkpoint as checkpoints
from mlray.training import contents, fit, parts, placement, plan, report, resume
from mlray.training.folders import Folders
from mlray.training.plan import Plan


@dataclass(frozen=True)
class Prepared:
    """A run whose parts are made and checked, and whose training has not begun."""

    config: RunConfig
    folders: Folders
    manifest: Manifest
    tokens: Any
    fertility: dict[str, dict[str, float]]
    outline: Plan
    found: checkpoints.Checkpoint | None
    """Where it goes on."""
    console: Console


def pretrain(config: RunConfig, *, plan_only: bool = False) -> dict[str, Any]:
    """Runs (or resumes) a training, prints plan and result, and returns the report (empty with `plan_only`).

    Raises:
        ConfigError: the configuration cannot run; the sentence says what to change.
        RunError: storage or the workers failed.
    """
    prepared = prepare(config)
    return {} if plan_only else complete(prepared)


def prepare(config: RunConfig) -> Prepared:
    """Everything before the training: manifest, tokenizer, labels, plan; each is made once and kept.

    Raises:
        ConfigError: the configuration cannot run; the sentence says what to change.
        RunError: storage failed.
    """
    backbone.quiet()
    check_family(config.objective, config.model)
    check_places(config)
    _check_adapter(config.adapter)
    console = Console(width=None if os.environ.get("COLUMNS") else 110)
    config = placed(config)
    folders = Folders.of(config)
    corpus_sources = sources.import_datasets(config.corpus.sources, folders.imported, config.storage)
    files = sources.list_files(corpus_sources, config.storage)
    files = guarded(files, config, folders.corpus)
    check_sources(config.objective, files)
    found = checkpoints.newest(folders.checkpoints, config.storage)[0] if config.train.resume else None
    config = contents.keep_vectors(config, found)
    # Shows before anything costs time whether the run folder can be written.
    storage.write_bytes(storage.join(folders.root, "config.yaml"), config.to_yaml().encode(), config.storage)
    if found:
        resume.check(config, found)
    placement.connect(config)
    manifest = _manifest(config, folders, files, found)
    manifests.check_languages(manifest, config.corpus.languages)
    _check_early_stopping(config, manifest)
    tokens = _tokenizer(config, folders, manifest, resumes=found is not None)
    contents.keep_labels(config, manifest, resumes=found is not None)
    contents.keep_frequencies(config, manifest, tokens, resumes=found is not None)
    room = config.corpus.sequence_length // OBJECTIVES[config.objective.name].texts_in_row - 2
    fertility = measure_fertility(tokens, validation.texts(manifest), room)
    report.show_fertility(fertility, console)
    parts.open_cutter(config, tokens, manifest)  # refuses what is no corpus for the objective
    model = parts.open_model(config, tokens)
    if found:
        resume.check_backbone(config, found, model)
    parts.open_export(
        config, model, tokens
    )  # refuses an adapter, or a part to freeze, that the model has not
    check_positions(config, backbone.positions(model))
    if isinstance(model, embedder.Distiller):
        check_positions(config, backbone.positions(model.teacher), "teacher")
    plan.check_batches(config, manifest)
    outline = plan.make(config, manifest, fertility, model)
    plan.show(outline, manifest.refused_counts(), console)
    if OBJECTIVES[config.objective.name].labels_of:
        plan.show_order(outline, config.corpus.window_rows, console)
    return Prepared(config, folders, manifest, tokens, fertility, outline, found, console)


def _check_adapter(adapter: Adapter) -> None:
    """Refuses what a training would not use.

    Raises:
        ConfigError: a trained adapter, one that lies below none, or DoRA with dropout above one.
    """
    if adapter.path:
        raise ConfigError(
            "adapter.path names a trained adapter to judge; leave it out, a training makes its own"
        )
    if adapter.language_path and adapter.kind == "none":
        raise ConfigError(
            "adapter.language_path lies below an adapter, and adapter.kind=none trains the whole model; set the kind"
        )
    if adapter.language_path and adapter.kind == "dora" and adapter.dropout:
        # peft scales what lies below it only without dropout: another function would be trained than is judged.
        raise ConfigError(
            "adapter.kind=dora above adapter.language_path knows no adapter.dropout; set it to 0, or take lora"
        )


def complete(prepared: Prepared) -> dict[str, Any]:
    """Trains from where the run stands, and returns the report.

    Raises:
        ConfigError: the cluster cannot place the workers.
        RunError: storage or the workers failed.
    """
    config, folders, found, console = prepared.config, prepared.folders, prepared.found, prepared.console
    if found and resume.finished(found.progress, config.train):
        console.print(f"{config.run.name} is finished; this is its report")
    else:
        if found:
            console.print(f"goes on after step {found.progress.step:,} from {found.uri}")
        found = _train(config, folders)
    console.print()  # the progress bar has not ended its line
    refused = prepared.manifest.refused_counts()
    result = report.build(config, found, prepared.outline, prepared.fertility, refused)
    report.save(result, folders.root, config)
    report.show(result, console)
    console.print(
        f"checkpoint  {found.uri}\nweights     {result['weights']}\nreport      {folders.root}/report.json"
    )
    return result


def placed(config: RunConfig) -> RunConfig:
    """The configuration with folders that mean the same to every process: workers have another working directory."""
    relative = not config.run.storage_uri.startswith(("/", "~", "s3://"))
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and relative:
        raise ConfigError(
            f"run.storage_uri={config.run.storage_uri} is relative, and a submitted job's working directory does not "
            "last; give an absolute path or s3://bucket/prefix"
        )
    place = storage.absolute(config.run.storage_uri)
    adapter = {name: _here(getattr(config.adapter, name)) for name in ("path", "language_path")}
    sections = {
        "run": config.run.model_copy(update={"storage_uri": place}),
        "recommendation": config.recommendation.model_copy(
            update={"vectors": _at(config.recommendation.vectors)}
        ),
        "tokenizer": config.tokenizer.model_copy(update={"path": _here(config.tokenizer.path)}),
        "model": config.model.model_copy(update={"path": _here(config.model.path)}),
        "adapter": config.adapter.model_copy(update=adapter),
        "distillation": config.distillation.model_copy(
            update={"teacher": _here(config.distillation.teacher)}
        ),
    }
    return config.model_copy(update=sections)


def _at(uri: str | None) -> str | None:
    return storage.absolute(uri) if uri else None


def _here(path: str | None) -> str | None:
    """A folder that is here by its absolute path; anything else, such as the name of a model on a hub, as it is."""
    return storage.absolute(path) if path and "://" not in path and Path(path).expanduser().is_dir() else path


def _train(config: RunConfig, folders: Folders) -> checkpoints.Checkpoint:
    placement.check(config)
    if not config.train.resume:  # not before all else is known to be right
        storage.delete_folder(folders.checkpoints, config.storage)
    fit.fit(config)
    found, _ = checkpoints.newest(folders.checkpoints, config.storage)
    if found is None:
        raise RunError(f"the workers ended without a checkpoint in {folders.checkpoints}")
    return found


def _check_early_stopping(config: RunConfig, manifest: Manifest) -> None:
    if config.train.early_stopping is None:
        return
    held_out = sorted({document.language for document in manifest.held_out})
    language = config.train.early_stopping.rpartition(".")[0]
    if language not in (["macro", *held_out] if held_out else []):
        raise ConfigError(
            f"train.early_stopping={config.train.early_stopping}: no held-out rows of {language!r}; there are some of "
            f"{', '.join(held_out) or 'no language'}"
        )


def _manifest(
    config: RunConfig, folders: Folders, files: list[sources.SourceFile], found: checkpoints.Checkpoint | None
) -> Manifest:
    """The manifest, made again if its files look others: copied elsewhere they hold the same documents."""
    fingerprint = manifests.fingerprint(files, config.corpus)
    kept = manifests.load(folders.corpus, config.storage)
    if kept is not None and kept.fingerprint == fingerprint:
        manifest = kept
    else:
        manifest = stream.build_manifest(files, config.corpus, config.storage, fingerprint)
    if found:
        resume.check_corpus(found, manifest)
    if manifest is not kept:
        manifests.save(manifest, folders.corpus, config.storage)
    return manifest


def _tokenizer(config: RunConfig, folders: Folders, manifest: Manifest, resumes: bool) -> Any:
    """The run's own tokenizer if it still fits, else the one that is named, else a newly trained one."""
    objective = OBJECTIVES[config.objective.name]
    mark = storage.join(folders.tokenizer, "MADE_FROM")
    fingerprint = resume.tokenizer_fingerprint(config, manifest).encode()
    made = storage.exists(mark, config.storage)
    if made and (resumes or storage.read_bytes(mark, config.storage) == fingerprint):
        with storage.local_copy(folders.tokenizer, config.storage) as folder:
            return tokenizer.load(folder, objective.special_tokens)
    path = config.tokenizer.path or config.model.path
    if path:
        with storage.local_copy(path, config.storage) as folder:
            tokens = tokenizer.load(folder, objective.special_tokens)
    else:
        tokens = _trained(config, manifest)
    storage.delete_folder(folders.tokenizer, config.storage)  # of another one files may be left
    with storage.staging() as stage:
        tokens.save_pretrained(str(stage))
        storage.upload(stage, folders.tokenizer, config.storage)
    storage.write_bytes(mark, fingerprint, config.storage)
    return tokens


def _trained(config: RunConfig, manifest: Manifest) -> Any:
    objective = OBJECTIVES[config.objective.name]
    languages = objective.language_tokens(manifest.languages)
    if config.tokenizer.algorithm == "items":
        return items.of_items(contents.catalogue(config, manifest), config.tokenizer, languages)
    texts = _texts(config, manifest)
    return tokenizer.train(texts, config.tokenizer, languages, writes=objective.writes)


def _texts(config: RunConfig, manifest: Manifest) -> Iterator[str]:
    """The first documents of the mixture, at most once through the corpus."""
    reader = parts.open_reader(config, manifest)
    limit = min(config.tokenizer.train_rows, int(reader.mixture.counts.sum()))
    documents = (
        text
        for number in itertools.count()
        for pair in zip(*_sides(reader, number), strict=True)
        for half in pair
        for text in half.split(SEPARATOR)
        if text
    )
    return itertools.islice(documents, limit)


def _sides(reader: WindowReader, number: int) -> tuple[list[str], list[str]]:
    window = reader.read(number)
    return window.text, window.pair
