"""What the workers' failures tell, and early stopping."""

from __future__ import annotations

import pytest

from mlray import configuration
from mlray.training import fit
from mlray.training.checkpoint import Progress


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "Training failed due to worker errors:\n[Rank 0]\n  File x\nValueError: no such thing",
            "ValueError: no such thing",
        ),
        (
            "ray.exceptions.RayTaskError: x\nmlray.storage.StorageError: s3://b/de.txt: NoSuchKey\n"
            "ray.exceptions.UserCodeException: UDF failed to process a data block",
            "s3://b/de.txt: NoSuchKey",
        ),
        ("[Rank 1]\nmlray.config.RunError: the stream of batches ended\n\n", "the stream of batches ended"),
        ("", "RuntimeError"),
    ],
)
def test_the_cause_is_our_own_sentence_where_there_is_one(text: str, cause: str) -> None:
    assert fit._cause(RuntimeError(text)) == cause


def test_early_stopping_counts_validations_without_a_better_value() -> None:
    config = configuration.load(None, ["train.early_stopping=pt-BR.accuracy", "train.patience=2"])
    progress, stops = Progress(), []
    for value in (0.5, 0.6, 0.6, 0.7, 0.2, 0.7):
        progress.validations.append({"step": 0, "languages": {"pt-BR": {"accuracy": value}}})
        stops.append(fit._should_stop(progress, config))
    assert stops == [False, False, False, False, False, True]
    assert progress.best == -0.7
