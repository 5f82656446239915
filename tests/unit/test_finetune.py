"""Fine-tuning: what is judged is what was trained, and what cannot run is refused before it costs anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from jobs import finetune as job
from mlray.config import ConfigError, Contrastive, RunConfig, RunError
from mlray.evaluation import evaluate
from mlray.evaluation.labelling import Judge
from mlray.models import backbone, embedder
from mlray.objectives.embedding import TextEmbedder
from mlray.training import parts
from mlray.tuning import finetune
from tests.unit import test_embedder, test_labels, tiny

TRAINED = {"weights": "run/weights", "documents": {"de": 9.0}}


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "base"}, **sections})


def test_a_whole_model_takes_the_place_of_the_backbone() -> None:
    judged = finetune.judged(config(), {"weights": "run/weights", "documents": {"de": 9.0, "sw": 1.0}})
    assert judged.corpus.languages == ("de", "sw")
    assert (judged.model.path, judged.adapter.path) == ("run/weights", None)


def test_an_adapter_is_judged_on_its_backbone_and_language_adapter() -> None:
    judged = finetune.judged(config(adapter={"kind": "lora", "language_path": "de"}), TRAINED)
    assert (judged.model.path, judged.adapter.path, judged.adapter.language_path) == (
        "base",
        "run/weights",
        "de",
    )


def test_only_an_adapter_can_be_merged() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.kind=none leaves no adapter to merge"):
        finetune.finetune(config(), merged=True)
    labels = config(adapter={"kind": "ia3"}, objective={"name": "classification"}, model={"path": "any"})
    with pytest.raises(
        ConfigError, match=r"adapter\.kind=ia3 of objective\.name=classification cannot be merged"
    ):
        finetune.finetune(labels, merged=True)
    tasks = [{"name": "intent", "objective": "classification"}]
    several = config(
        adapter={"kind": "ia3"}, objective={"name": "multitask", "tasks": tasks}, model={"path": "any"}
    )
    with pytest.raises(ConfigError, match=r"objective\.name=multitask cannot be merged"):
        finetune.finetune(several, merged=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers")
@pytest.mark.parametrize("objective", ["contrastive", "distillation"])
def test_a_merged_encoder_makes_the_vectors_of_its_adapter(objective: str, tmp_path: Path) -> None:
    base = test_embedder.exported(tmp_path / "base", pooling="cls")
    merging = config(
        run={"name": "aligned", "storage_uri": str(tmp_path)},
        model={"family": "xlm-roberta", "path": str(base), "dropout": 0.0},
        objective={"name": objective},
        contrastive={"pooling": "cls"},
        distillation={"teacher": str(base)},
        adapter={"kind": "lora"},
        corpus={"sequence_length": 60},
    )
    tiny.tokens().save_pretrained(tmp_path / "aligned" / "tokenizer")
    other = merging.model_copy(update={"contrastive": Contrastive(pooling="mean")})
    with pytest.raises(
        ConfigError, match=r"contrastive\.pooling=mean, .* 1_Pooling says cls; set contrastive\.pooling=cls"
    ):
        parts.open_model(other, tiny.tokens())
    trained = parts.open_model(merging, tiny.tokens())
    export = parts.open_export(merging, trained, tiny.tokens())
    moving = {name: one.detach() for name, one in trained.named_parameters() if one.requires_grad}
    for parameter in moving.values():
        parameter += 0.1 * torch.randn_like(parameter)
    export(moving, tmp_path / "adapter")
    (tmp_path / "aligned" / "merged").mkdir()
    (tmp_path / "aligned" / "merged" / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier try")
    place = Path(finetune.merge(merging, {"weights": str(tmp_path / "adapter")}))
    assert embedder.pooling_of(place) == "cls"  # as `distillation.teacher` reads it
    assert [path.name for path in place.glob("*.safetensors")] == ["model.safetensors"]
    expected = TextEmbedder(merging, base, tmp_path / "adapter").embed(test_embedder.TEXTS)
    peer = SentenceTransformer(str(place), device="cpu", local_files_only=True)
    peer.max_seq_length = 60
    found = np.stack([peer.encode([text], show_progress_bar=False)[0] for text in test_embedder.TEXTS])
    assert np.abs(found - expected).max() < 5e-6
    assert np.abs(TextEmbedder(merging, place).embed(test_embedder.TEXTS) - expected).max() < 5e-6


@pytest.mark.parametrize(
    ("adapter", "complaint"),
    [
        ({"language_path": "de"}, r"adapter\.language_path lies below an adapter, and adapter\.kind=none"),
        ({"kind": "lora", "path": "trained"}, r"adapter\.path names a trained adapter to judge"),
        (
            {"kind": "dora", "language_path": "de", "dropout": 0.1},
            r"adapter\.kind=dora above adapter\.language_path knows no adapter\.dropout",
        ),
    ],
)
def test_an_adapter_that_a_training_would_not_use_is_refused(adapter: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        finetune.finetune(config(adapter=adapter))


def test_an_adapter_without_its_weights_is_not_judged() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.kind=lora but adapter\.path is empty"):
        evaluate.evaluate(config(adapter={"kind": "lora"}))


def test_rows_beyond_the_positions_of_a_model_are_not_judged(tmp_path: Path) -> None:
    network = test_labels.model("words", test_labels.TAGS)  # 64 positions
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    backbone.export(network, tiny.tokens(), weights, tmp_path)
    asked = config(model={"family": "bert", "path": str(tmp_path)}, objective={"name": "tagging"})
    with pytest.raises(
        ConfigError, match=r"corpus\.sequence_length=128 is longer than the model's 64 positions"
    ):
        Judge(asked, ["de"], tmp_path)


def test_without_a_backbone_there_is_nothing_to_tune() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is empty, and fine-tuning starts from a backbone"):
        finetune.finetune(RunConfig())


def test_a_translator_may_start_from_nothing() -> None:
    nowhere = {"sources": [{"uri": "nowhere/test.jsonl", "language": "en-de"}]}
    with pytest.raises(RunError, match=r"nowhere/test\.jsonl"):  # it has come as far as the test set
        finetune.finetune(
            config(model={"family": "m2m_100"}, evaluation=nowhere, objective={"name": "translation"})
        )


def test_a_test_set_that_is_not_there_ends_the_job_first() -> None:
    nowhere = {"sources": [{"uri": "nowhere/test.jsonl", "language": "de"}]}
    with pytest.raises(RunError, match=r"nowhere/test\.jsonl"):
        finetune.finetune(config(evaluation=nowhere, objective={"name": "tagging"}))
    with pytest.raises(ConfigError, match=r"objective\.name=masked has no test"):
        finetune.finetune(config(evaluation=nowhere))


def test_the_job_ends_with_one_line_on_what_cannot_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "der Tee", "pair": "the tea"}, {"text": "die Uhr", "pair": " "}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    source = f"evaluation.sources=[{{uri: {tmp_path}/test.jsonl, language: de-en%s}}]"
    told = ["objective.name=translation", "model.family=m2m_100"]
    for own, complaint in (
        ([source % ", pair: pair"], f"{tmp_path}/test.jsonl: row 1 cannot be scored: empty"),
        ([source % ""], f"{tmp_path}/test.jsonl: row 0 has no reference or label"),
        (
            [source % ", pair: pair", f"model.path={tmp_path}"],
            f"{tmp_path} is a bert checkpoint; set model.family",
        ),
        (
            [source % ", pair: pair", "model.family=bert"],
            "model.family=bert does not fit objective.name=translation",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["finetune.py", *told, *own])
        assert job.main() == 2
        printed, said = capsys.readouterr()
        assert printed == ""
        assert said.startswith(f"configuration: {complaint}")
        assert said.count("\n") == 1
