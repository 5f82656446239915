"""Alignment on an S3 server with two ZeRO workers: from pairs to retrieval, vectors and hard negatives."""

from __future__ import annotations

import io
import json
from typing import Any

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest

from mlray import storage
from mlray.config import ConfigError, RunConfig, Source
from mlray.objectives.embedding import TextEmbedder
from mlray.training.pretrain import prepare, pretrain
from mlray.tuning.embed import embed
from mlray.tuning.finetune import finetune
from mlray.tuning.mine import mine
from tests.cluster import corpus as sample

pytestmark = [pytest.mark.cluster, pytest.mark.long]


def test_the_run_leaves_report_and_ranked_lists(aligned: RunConfig, bucket: str) -> None:
    place = f"s3://{bucket}/runs/aligned"
    told = json.loads(storage.read_bytes(f"{place}/report.json", aligned.storage))
    assert sum(told["documents"].values()) == 2 * 16 * 10  # both texts of each pair
    assert told["losses"][-1][1] < told["losses"][0][1]
    run = storage.read_bytes(f"{place}/evaluation/run.trec", aligned.storage).decode().splitlines()
    judged = storage.read_bytes(f"{place}/evaluation/qrels.trec", aligned.storage).decode().splitlines()
    assert {line.split()[0] for line in run} == {line.split()[0] for line in judged}


def test_one_worker_sees_the_same_batches(aligned: RunConfig, bucket: str) -> None:
    alone = sample.aligning(
        bucket, "aligned-alone", cluster={"num_workers": 1}, train={"micro_batch_size": 16, "steps": 5}
    )
    both = json.loads(storage.read_bytes(f"s3://{bucket}/runs/aligned/report.json", aligned.storage))
    seen = [[digest for _, _, digest in report["losses"][:5]] for report in (both, pretrain(alone))]
    assert seen[0] == seen[1]


def test_vectors_are_written_in_the_order_of_the_texts(aligned: RunConfig, bucket: str, s3: str) -> None:
    texts = [text for language in sample.LANGUAGES for text in sample.sentences(language)[:40]]
    rows: list[dict[str, Any]] = [{"id": i, "text": text, "language": "de"} for i, text in enumerate(texts)]
    rows[7]["text"] = None
    rows[9]["id"] = None
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    boto3.client("s3", endpoint_url=s3).put_object(Bucket=bucket, Key="texts.jsonl", Body=body.encode())
    source = Source(uri=f"s3://{bucket}/texts.jsonl", language="column:language", part_by="id")
    output = f"s3://{bucket}/vectors.parquet"
    assert embed(aligned, sample.weights(bucket), source, output) == len(texts) - 2
    table = pq.read_table(io.BytesIO(storage.read_bytes(output, aligned.storage)))
    assert table.column("id").to_pylist() == [str(i) for i in range(len(texts)) if i not in {7, 9}]
    found = np.array(table.column("vector").to_pylist())
    with storage.local_copy(sample.weights(bucket), aligned.storage) as folder:
        expected = TextEmbedder(aligned, folder).embed(
            [text for i, text in enumerate(texts) if i not in {7, 9}]
        )
    assert np.abs(found - expected).max() < 1e-6
    with pytest.raises(ConfigError, match=r"holds no checkpoint of `transformers`"):
        embed(aligned, f"s3://{bucket}/nothing", source, output)


def test_mined_negatives_are_a_source_of_pairs(aligned: RunConfig, bucket: str) -> None:
    output = f"s3://{bucket}/mined.jsonl"
    told = mine(aligned, sample.weights(bucket), output, count=3, margin=0.0, depth=20)
    rows = [json.loads(line) for line in storage.read_bytes(output, aligned.storage).decode().splitlines()]
    assert told["pairs"] == len(rows)
    assert told["negatives"] == sum(len(row["negatives"]) for row in rows) > len(rows)
    for row in rows:
        assert row["pair"] not in row["negatives"]
        assert all(score <= row["score"] + 1e-4 for score in row["scores"])
        assert row["ranks"] == sorted(row["ranks"])
        assert row["model"] == sample.weights(bucket)
    assert len({row["item"] for row in rows}) < len(rows)  # each product is told in several languages
    source = {
        "uri": output,
        "pair": "pair",
        "negatives": "negatives",
        "language": "column:language",
        "item": "item",
    }
    again = sample.aligning(bucket, "hard", corpus={"sources": [source], "sequence_length": 128},
                   model={"max_positions": 128})  # fmt: skip
    manifest = prepare(again).manifest
    assert manifest.refused_counts() == {}
    assert sum(manifest.documents().values()) + len(manifest.held_out) == len(rows)


def test_a_student_is_distilled_by_the_job(aligned: RunConfig, bucket: str, s3: str) -> None:
    german, english = (sample.sentences(language)[:200] for language in ("de", "en"))
    pairs = [{"de": one, "en": other} for one, other in zip(german, english, strict=True)]
    body = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    boto3.client("s3", endpoint_url=s3).put_object(Bucket=bucket, Key="halves.jsonl", Body=body.encode())
    source = {"uri": f"s3://{bucket}/halves.jsonl", "text": "de", "pair": "en", "language": "de-en"}
    made = sample.aligning(
        bucket,
        "distilled",
        corpus={"sources": [{**source, "part": [0.1, 1.0]}], "validation_rows": 8},
        objective={"name": "distillation"},
        distillation={"teacher": sample.weights(bucket)},
        evaluation={"sources": [{**source, "part": [0.0, 0.1]}], "resamples": 20},
        tokenizer={"vocab_size": 1500},
        train={"steps": 4},
    )
    report = finetune(made)
    assert report is not None
    assert report.cells["retrieval"].keys() == {"de-en", "en-de"}
    told = json.loads(storage.read_bytes(f"s3://{bucket}/runs/distilled/report.json", made.storage))
    assert told["losses"][-1][1] < told["losses"][0][1]
    absent = {"teacher": f"s3://{bucket}/nowhere"}
    alone = sample.aligning(bucket, "none", objective={"name": "distillation"}, distillation=absent)
    with pytest.raises(ConfigError, match=r"distillation\.teacher=.*nowhere holds no checkpoint"):
        finetune(alone)


def test_a_language_with_less_than_a_batch_is_told_before_it_starts(cluster: str, bucket: str) -> None:
    short = sample.aligning(bucket, "short", train={"global_batch_size": 64, "micro_batch_size": 16})
    corpus = short.corpus.model_copy(update={"batches": "language", "window_rows": 256})
    with pytest.raises(ConfigError, match=r"^ar has 46 pairs, less than the batch of 64"):
        pretrain(short.model_copy(update={"corpus": corpus}), plan_only=True)
