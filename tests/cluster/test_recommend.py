"""A recommender on an S3 server: sessions and vectors of texts, two ZeRO workers, a resume on the run's own vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mlray import storage
from mlray.config import ConfigError, Source
from mlray.evaluation import evaluate
from mlray.objectives.recommending import NextItem
from mlray.release import indexing, promotion
from mlray.release.index import ProductIndex
from mlray.release.registry import open_registry
from mlray.tuning.finetune import finetune
from tests.cluster import corpus as sample
from tests.cluster.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.usefixtures("cluster")]

SESSIONS = {
    "uri": str(ROOT / "mlray/corpus/sample/sessions.jsonl"),
    "text": "events.*.product_id",
    "language": "column:language",
    "part_by": "session_id",
    "last_is_pair": True,
    "query": "query",
}
SOLD = {
    "uri": str(ROOT / "mlray/corpus/sample/products.jsonl"),
    "text": "product_id",
    "language": "column:language",
    "part_by": "product_id",
}
NEVER = "p-nobody-has-bought"


def vectors(folder: Path, seed: int) -> str:
    """Of the sample's products, and of one that is in no session."""
    names = [*(f"p{number:03}" for number in range(1, 65)), NEVER]
    rows = np.random.default_rng(seed).normal(size=(len(names), 8)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 8)
    place = folder / "vectors.parquet"
    pq.write_table(pa.table({"id": names, "vector": column}), place)
    return str(place)


def test_a_recommender_is_trained_resumed_and_judged(bucket: str, tmp_path: Path) -> None:
    place = vectors(tmp_path, seed=1)
    sections: dict[str, Any] = {
        "corpus": {"sources": [SESSIONS], "sequence_length": 16, "window_rows": 128, "validation_rows": 4},
        "objective": {"name": "next_item"},
        "recommendation": {"vectors": place},
        "tokenizer": {"algorithm": "items", "vocab_size": 128},
        "model": {"family": "gpt2"},
        "train": {"steps": 4, "checkpoint_every": 2, "validate_every": 2},
        "evaluation": {"sources": [SESSIONS], "resamples": 20, "negatives": 9, "max_bad_rows": 10},
    }
    first = finetune(
        sample.config(bucket, "sessions", **{**sections, "train": {**sections["train"], "steps": 2}})
    )
    assert first is not None
    root = f"s3://{bucket}/runs/sessions"
    (kept,) = [
        name for name in storage.walk(root, sample.config(bucket, "x").storage) if name.startswith("items-")
    ]
    begun_with = storage.read_bytes(f"{root}/{kept}", sample.config(bucket, "x").storage)
    assert begun_with == Path(place).read_bytes()
    vectors(tmp_path, seed=2)  # another file at the same place: the run goes on with its own
    config = sample.config(bucket, "sessions", **sections)
    report = finetune(config)
    assert report is not None
    now = yaml.safe_load(storage.read_bytes(f"{root}/checkpoints/step-00000004/config.yaml", config.storage))
    assert storage.read_bytes(now["recommendation"]["vectors"], config.storage) == begun_with
    assert [name for name in storage.walk(root, config.storage) if name.startswith("items-")] == [kept]
    tables = {task: sorted(table) for task, table in report.cells.items()}
    assert tables == {"recommendation 9": sorted(sample.LANGUAGES), "catalogue": sorted(sample.LANGUAGES)}
    weights = f"{root}/checkpoints/step-00000004/weights"
    trained = config.model_copy(update={"model": config.model.model_copy(update={"path": weights})})
    again, _ = evaluate.evaluate(trained, show_progress=False)
    assert again.cells == report.cells
    with storage.local_copy(weights, config.storage) as folder:
        model = NextItem(trained, folder)
    scores = model.scores(["p001 p002"], ["de"])[0]
    assert np.isfinite(scores).all()
    assert not any(name.startswith("query:") for name in model.items)
    assert (model.scores(["query:for p001 p002"], ["de"])[0] != scores).any()  # the word is known
    assert scores[model.items[NEVER]] != 0.0  # it is made of its text alone
    placed = {
        "release": config.release.model_copy(update={"registry_uri": f"s3://{bucket}/sessions-registry"})
    }
    released = config.model_copy(update=placed)
    promotion.challenge(released, root, "")
    index = indexing.build(released, None, Source.model_validate(SOLD))
    registry = open_registry(released)
    with storage.local_copy(registry.place("indexes", index), config.storage) as folder:
        products = ProductIndex.load(folder)
    assert products.markets == dict.fromkeys(sample.LANGUAGES, 64)
    bought = ["p001", "p064"]
    np.testing.assert_allclose(
        products.vectors("ja", bought), model.vectors(bought), atol=1e-3
    )  # half floats
    for other in ({}, {"vectors": place, "candidates": "all"}):
        with pytest.raises(ConfigError, match=r"recommendation\.\w+=.* but .* was trained with"):
            finetune(sample.config(bucket, "sessions", **{**sections, "recommendation": other}))
