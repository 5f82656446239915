"""What the workers' failures tell, and early stopping."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlray import configuration
from mlray.config import RunConfig, RunError
from mlray.corpus import validation
from mlray.corpus.lines import Chunk
from mlray.corpus.manifest import ChunkEntry, HeldOut, Manifest, Part
from mlray.corpus.mixture import Mixture
from mlray.corpus.sources import SourceFile
from mlray.models import tokenizer
from mlray.training import checkpoint, fit, resume
from mlray.training.checkpoint import Progress
from mlray.training.engine import Engine
from mlray.training.folders import Folders
from tests.unit import tiny


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "Training failed due to worker errors:\n[Rank 0]\n  File x\nValueError: no such thing",
            "ValueError: no such thing",
        ),
        (
            "ray.exceptions.RayTaskError: x\nmlray.access.StorageError: s3://b/de.txt: NoSuchKey\n"
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
        stops.append(resume.should_stop(progress, config.train))
    assert stops == [False, False, False, False, False, True]
    assert progress.best == -0.7


def test_rows_of_a_window_follow_the_held_out_documents() -> None:
    table = tiny.held_out({"de": 30, "en": 0}, 32)
    file = SourceFile("corpus.jsonl", 1, "1", "jsonl", None, ("text",), None, None, "language")
    parts = tuple(Part(name, 10, 400, ()) for name in tiny.LANGUAGES)  # 40 characters each
    held = tuple(HeldOut("de", text, "") for text in tiny.texts("de", 30, seed=9))
    manifest = Manifest((ChunkEntry(Chunk(file), parts),), held, (), "")
    by_hand = [
        len(ids) + 2 for ids in tokenizer.encoder(tiny.tokens()).encode([entry.text for entry in held])
    ]
    mean = sum(by_hand) / sum(len(entry.text) for entry in held) * 40
    assert validation.tokens_per_document(manifest, table).tolist() == pytest.approx([mean, 0.0])
    config = RunConfig.model_validate({"corpus": {"window_rows": 640, "sequence_length": 32, "alpha": 0.0}})
    mixture = Mixture.of(manifest, config.corpus, 0)
    found = fit._rows_per_window(config, manifest, mixture, tiny.cutter(32))
    assert found == pytest.approx(640 * (mean / 2 / 2 + 3 / 2) / 32)  # two languages, half of each


def test_the_best_validation_is_remembered_with_its_step() -> None:
    config = configuration.load(None, ["train.early_stopping=de.loss", "train.patience=2"])
    progress, stops = Progress(), []
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.2)):
        progress.step = step
        progress.validations.append({"step": step, "languages": {"de": {"loss": loss}}})
        stops.append(resume.should_stop(progress, config.train))
    assert stops == [False, False, False, True]
    assert (progress.best, progress.best_step) == (2.0, 20)


def test_a_language_that_the_validation_lacks_is_named() -> None:
    config = configuration.load(None, ["train.early_stopping=sw.loss"])
    progress = Progress(validations=[{"step": 0, "languages": {"de": {"loss": 1.0}, "macro": {"loss": 1.0}}}])
    for look in (resume.watched, resume.should_stop):
        with pytest.raises(RunError) as caught:
            look(progress, config.train)
        assert str(caught.value) == (
            "train.early_stopping=sw.loss: the held-out rows of 'sw' hold nothing to predict; "
            "the validation has de, macro"
        )
    assert resume.watched(progress, configuration.load(None, ["train.early_stopping=de.loss"]).train) == 1.0
    assert resume.watched(progress, RunConfig().train) is None


def test_workers_that_start_again_after_an_early_stop_train_no_more(tmp_path: Path) -> None:
    config = configuration.load(
        None,
        [f"run.storage_uri={tmp_path}", "train.early_stopping=de.loss", "train.patience=2", "train.steps=9"],
    )
    model = tiny.encoder()
    engine = Engine(model, tiny.train(steps=3), 1)
    tiny.advance(engine, tiny.deal(tiny.rows(24), 8), tiny.train(steps=3))
    progress = Progress(step=3, best=1.0, best_step=1, stale=2)
    folder = Folders.of(config).checkpoints
    checkpoint.save(engine, progress, config.to_yaml(), tiny.export(model), folder, config.storage)
    fit._work({"config": config.model_dump(mode="json"), "backbone": None})  # else it would open the corpus
    assert sorted(path.name for path in (tmp_path / "pretrain").iterdir()) == ["checkpoints"]
