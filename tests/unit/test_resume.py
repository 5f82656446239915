"""What a resumed run must share with its checkpoint, and when a run is over."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mlray import configuration
from mlray.config import ConfigError, RunConfig
from mlray.models import adapters, backbone
from mlray.models.origin import Origin
from mlray.training import parts, resume
from mlray.training.checkpoint import Checkpoint, Progress
from tests.unit import test_adapters, tiny
from tests.unit.test_mixture import manifest_of

MANIFEST = manifest_of([{"de": 3}])


@pytest.fixture
def found(tmp_path: Path) -> Checkpoint:
    (tmp_path / "config.yaml").write_text(RunConfig().to_yaml(), encoding="utf-8")
    return Checkpoint(str(tmp_path), Progress(step=5))


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=9",
        "train.lr=1.0",
        "cluster.num_workers=2",
        "train.zero_stage=3",
        "run.name=other",
        "contrastive.cache=always",
        "train.global_batch_size=64",
    ],
)
def test_what_does_not_move_the_stream_may_change(found: Checkpoint, change: str) -> None:
    resume.check(configuration.load(None, [change]), found)


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("corpus.alpha", "0.7", "0.3"),
        ("corpus.window_rows", "64", "8192"),
        ("corpus.sequence_length", "64", "128"),
        ("corpus.batches", "language", "mixed"),
        ("contrastive.temperature", "0.1", "0.05"),
        ("distillation.loss", "similarity", "mse"),
        ("run.seed", "1", "0"),
        ("tokenizer.vocab_size", "900", "16000"),
        ("model.path", "s3://bucket/xlm-r", "None"),
        ("model.num_layers", "2", "4"),
        ("objective.whole_word", "True", "False"),
        ("train.early_stopping", "macro.loss", "None"),
    ],
)
def test_what_gives_the_position_its_meaning_may_not(
    found: Checkpoint, key: str, value: str, before: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resume.check(configuration.load(None, [f"{key}={value}"]), found)
    assert str(caught.value).startswith(f"{key}={value} but {found.uri} was trained with {before}; ")


@pytest.mark.parametrize(
    ("meaning", "fixed"),
    [
        ("objective.name=contrastive", "global"),
        ("corpus.batches=language", "global"),
        ("objective.name=next_item tokenizer.algorithm=items model.family=gpt2", "micro"),
        ("objective.name=distillation distillation.loss=similarity", "micro"),
        ("objective.name=distillation", ""),
    ],
)
def test_what_is_compared_in_a_batch_stays_together(tmp_path: Path, meaning: str, fixed: str) -> None:
    told = meaning.split()
    (tmp_path / "config.yaml").write_text(configuration.load(None, told).to_yaml(), encoding="utf-8")
    found = Checkpoint(str(tmp_path), Progress(step=5))
    for size in ("global", "micro"):
        changed = configuration.load(None, [*told, f"train.{size}_batch_size=32"])
        if size != fixed:
            resume.check(changed, found)
        else:
            with pytest.raises(ConfigError, match=rf"train\.{size}_batch_size=32 but"):
                resume.check(changed, found)


def test_an_adapter_does_not_go_on_above_other_weights(tmp_path: Path) -> None:
    config = configuration.load(None, ["adapter.kind=lora", "model.path=base"])
    model = tiny.encoder()
    found = Checkpoint(str(tmp_path), Progress(step=5))
    place = tmp_path / "weights"
    place.mkdir()
    (place / "adapter_model.safetensors").touch()
    Origin(adapters.digest(model), "masked", above_language=False, labels=[]).write(place)
    resume.check_backbone(config, found, model)
    Origin("0" * 64, "masked", above_language=False, labels=[]).write(place)
    with pytest.raises(ConfigError, match="was trained on the backbone 000000000000 and this one is"):
        resume.check_backbone(config, found, model)
    resume.check_backbone(RunConfig(), found, model)  # no adapter: the checkpoint holds all of the model


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_what_is_frozen_does_not_go_on_as_another(tmp_path: Path, family: str) -> None:
    config = configuration.load(None, ["train.freeze_embeddings=true", f"model.family={family}"])
    model = tiny.encoder(family)
    backbone.export(model, tiny.tokens(), dict(model.named_parameters()), tmp_path / "weights")
    found = Checkpoint(str(tmp_path), Progress(step=5))
    changed = tiny.encoder(family)
    layer = next(parameter for name, parameter in changed.named_parameters() if ".layer.0." in name)
    layer.data += 1.0  # it is trained: the checkpoint's own counts
    resume.check_backbone(config, found, changed)
    with pytest.raises(ConfigError, match=r"embeddings\..* is another in .* than in"):
        resume.check_backbone(config, found, tiny.encoder(family, seed=7))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
def test_an_adapter_does_not_go_on_above_another_language_adapter(tmp_path: Path) -> None:
    base, german = tmp_path / "base", tmp_path / "de"
    masked = tiny.encoder()
    backbone.export(masked, tiny.tokens(), dict(masked.named_parameters()), base)
    test_adapters.language_adapter(base, german, 0)
    config = RunConfig.model_validate(
        {
            "adapter": {"kind": "lora", "language_path": str(german)},
            "model": {"family": "bert", "path": str(base)},
        }
    )
    model = parts.open_model(config, tiny.tokens())
    export = parts.open_export(config, model, tiny.tokens())
    moved = {name: tensor + 0.1 for name, tensor in test_adapters.trained(model).items()}
    export(moved, tmp_path / "weights")
    found = Checkpoint(str(tmp_path), Progress(step=5))
    fresh = parts.open_model(config, tiny.tokens())
    resume.check_backbone(config, found, fresh)
    weights = german / "adapter_model.safetensors"
    digests = [hashlib.sha256(weights.read_bytes()).hexdigest()[:12]]
    test_adapters.language_adapter(base, german, 1)
    digests.append(hashlib.sha256(weights.read_bytes()).hexdigest()[:12])
    with pytest.raises(
        ConfigError,
        match=f"above the language adapter {digests[0]} and that at {german} is {digests[1]}; put",
    ):
        resume.check_backbone(config, found, fresh)
    adapters.load(fresh, tmp_path / "weights", german, objective="masked")  # to judge it, any will do


def test_a_position_holds_in_its_own_documents_alone(tmp_path: Path) -> None:
    found = Checkpoint(str(tmp_path), Progress(step=5, corpus=MANIFEST.digest))
    resume.check_corpus(found, MANIFEST)
    with pytest.raises(ConfigError, match=rf"^the documents .* are others than {tmp_path} was trained on"):
        resume.check_corpus(found, manifest_of([{"de": 4}]))


def test_a_run_is_over_after_its_steps_or_when_it_was_stopped() -> None:
    endless, patient = tiny.train(steps=10), tiny.train(steps=10, early_stopping="macro.loss", patience=2)
    assert [resume.finished(Progress(step=step), endless) for step in (9, 10, 11)] == [False, True, True]
    assert not resume.finished(Progress(step=9, stale=2), endless)
    assert [resume.finished(Progress(step=9, stale=stale), patient) for stale in (1, 2)] == [False, True]


def test_the_tokenizer_follows_what_it_is_made_from(tmp_path: Path) -> None:
    base = resume.tokenizer_fingerprint(RunConfig(), MANIFEST)
    assert resume.tokenizer_fingerprint(configuration.load(None, ["train.lr=1.0"]), MANIFEST) == base
    for change in (
        "tokenizer.vocab_size=99",
        "tokenizer.path=x",
        "model.path=x",
        "run.seed=2",
        "corpus.alpha=1",
    ):
        assert resume.tokenizer_fingerprint(configuration.load(None, [change]), MANIFEST) != base
    config = configuration.load(None, [f"model.path={tmp_path}"])
    found = []
    for content in ("one", "two", "one"):  # at one place
        (tmp_path / "tokenizer.json").write_text(content)
        found.append(resume.tokenizer_fingerprint(config, MANIFEST))
    assert found[0] == found[2] != found[1]
