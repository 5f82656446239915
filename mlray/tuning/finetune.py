"""One fine-tuning: trains on a backbone, whole, in part or by an adapter, and judges the result per language."""

from __future__ import annotations

from typing import Any

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.evaluation import evaluate, output
from mlray.evaluation.report import Report
from mlray.training.folders import Folders
from mlray.training.pretrain import pretrain


def finetune(config: RunConfig, *, plan_only: bool = False) -> Report | None:
    """Trains (or resumes), then evaluates on `evaluation.sources`, prints both, and keeps both in the run folder.

    Returns:
        The evaluation; None without test sets or with `plan_only`.

    Raises:
        ConfigError: there is no backbone, or the configuration cannot run; the sentence says what to change.
        RunError: storage or the workers failed.
    """
    if config.model.path is None:
        raise ConfigError(
            "model.path is empty, and fine-tuning starts from a backbone: a folder, an s3:// prefix or a hub name; "
            "jobs/pretrain.py trains from nothing"
        )
    if config.evaluation.sources:
        evaluate.read(config)  # a bad test row ends the job before it costs anything
    trained = pretrain(config, plan_only=plan_only)
    if plan_only or not config.evaluation.sources:
        return None
    result, rows = evaluate.evaluate(judged(config, trained["weights"]))
    with storage.staging() as stage:
        output.tell(result, rows, stage, as_json=False)
        place = storage.join(Folders.of(config).root, "evaluation")
        storage.upload(stage, place, config.storage)
    print(f"evaluation  {place}/report.json, report.html, predictions.jsonl")
    return result


def judged(config: RunConfig, weights: str) -> RunConfig:
    """The configuration that evaluates what a run has left at `weights`: a model, or an adapter on `model.path`."""
    section: dict[str, Any] = {"adapter": config.adapter.model_copy(update={"path": weights})}
    if config.adapter.kind == "none":
        section = {"model": config.model.model_copy(update={"path": weights})}
    return config.model_copy(update=section)
