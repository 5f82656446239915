"""A small corpus with known contents for the cluster tests."""

from __future__ import annotations

import gzip
import io
import json
from importlib import resources
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq

from mlray import configuration
from mlray.config import RunConfig

LANGUAGES = ("ar", "de", "en", "es", "fr", "ja", "ru", "zh")


def sentences(language: str) -> list[str]:
    """Descriptions, titles, phrasings and answers of the sample corpus in one language."""
    folder = resources.files("mlray.corpus") / "sample"
    texts: list[str] = []
    for line in (folder / "products.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["language"] == language:
            texts += [row["title"], row["description"]]
    for line in (folder / "support.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["language"] == language:
            texts += [*row["phrasings"], row["answer"]]
    return texts


def upload(endpoint: str, bucket: str) -> dict[str, int]:
    """Writes `s3://bucket/corpus/lang=<tag>/part-0.*` in three formats; returns the bad records per language.

    `de` is a gzipped text file with a line of bad UTF-8 and an empty one, `en` JSON lines with a NUL, a number and a
    broken object, the others parquet, `zh` with a null.
    """
    client = boto3.client("s3", endpoint_url=endpoint)
    for language in LANGUAGES:
        texts = sentences(language)
        if language == "de":
            lines = [text.encode() for text in texts]
            lines[3:3] = [b"\xff\xfe kaputt", b""]
            name, body = "part-0.txt.gz", gzip.compress(b"\n".join(lines) + b"\n")
        elif language == "en":
            rows = [json.dumps({"text": text}) for text in texts]
            rows[5:5] = [json.dumps({"text": "a\x00b"}), json.dumps({"text": 7}), '{"text": ']
            name, body = "part-0.jsonl", ("\n".join(rows) + "\n").encode()
        else:
            values: list[str | None] = [*texts]
            if language == "zh":
                values.insert(10, None)
            buffer = io.BytesIO()
            pq.write_table(pa.table({"text": values}), buffer, row_group_size=100)
            name, body = "part-0.parquet", buffer.getvalue()
        client.put_object(Bucket=bucket, Key=f"corpus/lang={language}/{name}", Body=body)
    return {"de": 2, "en": 3, "zh": 1}


def config(bucket: str, name: str, **sections: dict[str, Any]) -> RunConfig:
    """A tiny two-worker run on that corpus; sections override."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage_uri": f"s3://{bucket}/runs", "seed": 3},
        "corpus": {
            "sources": [{"uri": f"s3://{bucket}/corpus", "language": "partition"}],
            "window_rows": 256,
            "sequence_length": 64,
            "validation_rows": 8,
        },
        "tokenizer": {"vocab_size": 3500},
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 64,
            "max_positions": 64,
        },
        "train": {
            "steps": 10,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "lr": 2e-3,
            "warmup_steps": 2,
            "schedule": "constant",
            "precision": "fp32",
            "validate_every": 5,
            "checkpoint_every": 5,
            "log_every": 1,
            "zero_stage": 2,
        },
        "cluster": {"num_workers": 2},
    }
    for section, overrides in sections.items():
        values[section] = {**values.get(section, {}), **overrides}
    return configuration.build(values)


PRODUCTS = {
    "uri": str(resources.files("mlray.corpus") / "sample" / "products.jsonl"),
    "text": "title",
    "pair": "description",
    "language": "column:language",
    "part_by": "product_id",
    "item": "product_id",
}


def aligning(bucket: str, name: str, **sections: dict[str, Any]) -> RunConfig:
    """Titles and descriptions of four fifths of the products; those of the others are the test set."""
    return config(
        bucket,
        name,
        **{
            "corpus": {"sources": [{**PRODUCTS, "part": [0.2, 1.0]}], "validation_rows": 4},
            "objective": {"name": "contrastive"},
            "contrastive": {"cache": "always", "negatives": "all"},
            "evaluation": {"sources": [{**PRODUCTS, "part": [0.0, 0.2]}], "resamples": 20},
            **sections,
        },
    )


def weights(bucket: str) -> str:
    """Those that the fixture `aligned` leaves."""
    return f"s3://{bucket}/runs/aligned/checkpoints/step-00000010/weights"
