"""Fine-tuning on an S3 server, from backbone to the evaluation of its adapter, with two ZeRO workers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from jobs import finetune as job
from mlray import storage
from mlray.config import ConfigError
from mlray.evaluation import evaluate
from mlray.models.origin import Origin
from mlray.tuning.finetune import finetune, judge
from tests.cluster import corpus as sample
from tests.cluster.conftest import ROOT

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"),
]

SUPPORT = {
    "uri": str(ROOT / "mlray/corpus/sample/support.jsonl"),
    "text": "phrasings",
    "pair": "intent",
    "language": "column:language",
    "part_by": "intent",
}


def test_an_adapter_is_trained_and_judged_in_every_language(undisturbed: dict[str, Any], bucket: str) -> None:
    sections: dict[str, Any] = {
        "corpus": {"sources": [{**SUPPORT, "part": [0.0, 0.5]}]},
        "model": {"path": undisturbed["weights"]},
        "tokenizer": {},
        "objective": {"name": "classification"},
        "adapter": {"kind": "lora"},
        "train": {"steps": 2},
        "evaluation": {"sources": [{**SUPPORT, "part": [0.0, 0.5]}], "resamples": 20},
    }
    config = sample.config(bucket, "intents", **sections)
    report = finetune(config, merged=True)
    assert report is not None
    text = Path(SUPPORT["uri"]).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    languages = {row["language"] for row in rows}
    cells = report.cells["classification"]
    assert cells.keys() == languages
    place = f"s3://{bucket}/runs/intents/evaluation"
    kept = json.loads(storage.read_bytes(f"{place}/report.json", config.storage))
    assert kept["cells"]["classification"].keys() == languages
    lines = storage.read_bytes(f"{place}/predictions.jsonl", config.storage).decode().splitlines()
    assert len(lines) == sum(figures["accuracy"].n for figures in cells.values())
    assert b"<table" in storage.read_bytes(f"{place}/report.html", config.storage)
    with storage.local_copy(f"s3://{bucket}/runs/intents/merged", config.storage) as folder:
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert not any("lora" in name for name, _ in plain.named_parameters())
    with storage.local_copy(kept["about"]["adapter"], config.storage) as folder:
        assert Origin.of(folder).labels == sorted({row["label"] for row in map(json.loads, lines)})
    # Where the workers have GPUs and the job's own node has none, one of them judges: with the same result.
    elsewhere = config.model_copy(
        update={
            "adapter": config.adapter.model_copy(update={"path": kept["about"]["adapter"]}),
            "cluster": config.cluster.model_copy(update={"gpus_per_worker": 1.0}),
        }
    )
    again, _ = judge(elsewhere, evaluate.check(elsewhere))
    assert again.cells == report.cells
    nothing = elsewhere.model_copy(update={"adapter": config.adapter.model_copy(update={"path": None})})
    with pytest.raises(ConfigError) as told:
        judge(nothing, evaluate.check(elsewhere))
    assert str(told.value).startswith("adapter.kind=lora but adapter.path is empty; name the trained adapter")
    assert "\n" not in str(told.value)


def test_rows_that_the_training_cannot_answer_end_the_job_before_it_trains(
    undisturbed: dict[str, Any],
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def rows(name: str, *told: tuple[str, str]) -> dict[str, str]:
        lines = [json.dumps({"text": text, "pair": pair}) + "\n" for text, pair in told]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
        return {"uri": f"{tmp_path}/{name}", "pair": "pair", "language": "de"}

    known = [(f"der Tee {number}", ("O B-DRINK O", "O B-MEAL O")[number % 2]) for number in range(40)]
    for objective, pair, complaint in (
        ("tagging", "O B-CITY", r"test\.jsonl: row 1: the label 'B-CITY' is none of the 3"),
        ("tagging", "O O O", r"test\.jsonl: row 1 has 2 words and 3 tags"),
        ("classification", "O B-CITY", r"test\.jsonl: row 1: the label 'O B-CITY' is none of the 2"),
    ):
        config = sample.config(
            bucket,
            f"unheard-{objective}",
            corpus={"sources": [rows("training.jsonl", *known)]},
            model={"path": undisturbed["weights"]},
            tokenizer={},
            objective={"name": objective},
            train={"steps": 2},
            evaluation={"sources": [rows("test.jsonl", known[0], ("in Rom", pair))]},
        )
        (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
        monkeypatch.setattr("sys.argv", ["finetune.py", "--config", f"{tmp_path}/run.yaml"])
        capfd.readouterr()
        assert job.main() == 2
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("configuration: ")]
        assert len(said) == 1
        assert re.search(complaint, said[0])
        assert not storage.exists(f"s3://{bucket}/runs/unheard-{objective}/report.json", config.storage)
