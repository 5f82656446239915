"""One fine-tuning: trains on a backbone, whole, in part or by an adapter, and judges the result per language."""

from __future__ import annotations

from typing import Any

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.evaluation import evaluate, output
from mlray.evaluation.report import Report
from mlray.training import fit
from mlray.training.pretrain import complete, prepare


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
    # A test row that cannot be scored ends the job before it costs anything.
    rows, _ = evaluate.check(config) if config.evaluation.sources else ({}, [])
    prepared = prepare(config)
    if rows:
        evaluate.check_model(config, rows, prepared.tokens, fit.open_labels(prepared.config))
    if plan_only:
        return None
    trained = complete(prepared)
    if not rows:
        return None
    result, found = evaluate.evaluate(judged(config, trained))
    with storage.staging() as stage:
        output.tell(result, found, stage, as_json=False)
        place = storage.join(prepared.folders.root, "evaluation")
        storage.upload(stage, place, config.storage)
    print(f"evaluation  {place}/report.json, report.html, predictions.jsonl")
    return result


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
