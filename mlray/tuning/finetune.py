"""One fine-tuning: trains on a backbone, whole, in part or by an adapter, and judges the result per language.

A translator, or an encoder that is aligned, may also start from nothing: pairs are all that they need.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.corpus.testsets import Checked
from mlray.evaluation import evaluate, output
from mlray.evaluation.report import Report
from mlray.models import adapters
from mlray.objectives.table import HEADS, OBJECTIVES
from mlray.training import parts
from mlray.training.folders import Folders
from mlray.training.pretrain import complete, prepare

_FROM_NOTHING = {"translation", "contrastive", "distillation", "next_item"}
"""Objectives that pairs, or sessions, are enough for."""


def finetune(config: RunConfig, *, plan_only: bool = False, merged: bool = False) -> Report | None:
    """Trains (or resumes), then evaluates on `evaluation.sources`, prints both, and keeps both in the run folder.

    With `merged` the run folder also gets the plain model with the adapter added into its weights.

    Returns:
        The evaluation; None without test sets or with `plan_only`.

    Raises:
        ConfigError: there is no backbone, or the configuration cannot run; the sentence says what to change.
        RunError: storage or the workers failed.
    """
    if config.model.path is None and config.objective.name not in _FROM_NOTHING:
        raise ConfigError(
            "model.path is empty, and fine-tuning starts from a backbone: a folder, an s3:// prefix or a hub name; "
            "jobs/pretrain.py trains from nothing"
        )
    if merged and config.adapter.kind == "none":
        raise ConfigError("adapter.kind=none leaves no adapter to merge; the weights of the run are whole")
    if merged and config.adapter.kind == "ia3" and config.objective.name in {*HEADS, "multitask"}:
        raise ConfigError(
            f"adapter.kind=ia3 of objective.name={config.objective.name} cannot be merged: peft takes over no head of "
            "several layers with it; leave --merge out, or take lora or dora"
        )
    # A test row that cannot be scored ends the job before it costs anything.
    checked = evaluate.check(config) if config.evaluation.sources else None
    prepared = prepare(config)
    if checked:
        evaluate.check_model(config, checked[0], prepared.tokens, parts.open_labels(prepared.config))
    if plan_only:
        return None
    trained = complete(prepared)
    if merged:
        print(f"merged      {merge(prepared.config, trained)}")
    if not checked:
        return None
    result, found = judge(judged(prepared.config, trained), checked)  # with folders that other nodes find too
    place = storage.join(prepared.folders.root, "evaluation")
    output.tell(result, found, place, config.storage, as_json=False)
    print(f"evaluation  {place}/report.json, report.html, predictions.jsonl")
    return result


def judge(config: RunConfig, checked: Checked) -> tuple[Report, list[dict[str, Any]]]:
    """The evaluation, where the workers' hardware is: the node of the job often has no GPU."""
    gpus = config.cluster.gpus_per_worker
    if not gpus or torch.cuda.is_available():
        return evaluate.evaluate(config, checked)
    task = ray.remote(num_gpus=gpus, num_cpus=config.cluster.cpus_per_worker)(evaluate.evaluate)
    try:
        found: tuple[Report, list[dict[str, Any]]] = ray.get(
            task.remote(config, checked, show_progress=False)
        )
    except RayTaskError as error:
        raise error.cause from None  # our own error, without the traceback of the other process
    return found


def merge(config: RunConfig, trained: dict[str, Any]) -> str:
    """Adds the adapter that a run has left into its backbone; returns where the plain model lies.

    Raises:
        ConfigError: the adapter is none of the backbone.
    """
    folders = Folders.of(config)
    tokens = parts.open_tokenizer(config, folders)
    model = parts.open_model(config, tokens)
    with contextlib.ExitStack() as stack:
        places = (trained["weights"], config.adapter.language_path)
        adapter, language = (
            stack.enter_context(storage.local_copy(uri, config.storage)) if uri else None for uri in places
        )
        assert adapter is not None
        model.model = adapters.merge(adapters.load(model, adapter, language, objective=config.objective.name))
        stage = stack.enter_context(storage.staging())
        OBJECTIVES[config.objective.name].export(model, tokens, dict(model.named_parameters()), stage)
        place = storage.join(folders.root, "merged")
        storage.delete_folder(place, config.storage)  # of an earlier try other files may be left
        storage.upload(stage, place, config.storage)
    return place


def judged(config: RunConfig, trained: dict[str, Any]) -> RunConfig:
    """The configuration that evaluates what a run has left: a model, or an adapter on `model.path`.

    Every language of the training is named, so that one without test rows has a cell that says so.
    """
    weights = trained["weights"]
    section: dict[str, Any] = {"adapter": config.adapter.model_copy(update={"path": weights})}
    if config.adapter.kind == "none":
        section = {"model": config.model.model_copy(update={"path": weights})}
    section["corpus"] = config.corpus.model_copy(update={"languages": tuple(trained["documents"])})
    return config.model_copy(update=section)
