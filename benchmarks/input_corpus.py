"""The text of the input benchmark: real lines of many languages as parquet on S3, and a tokenizer for them."""

from __future__ import annotations

import contextlib
import gzip
import itertools
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
from arm import Corpus

from mlray import config
from mlray.corpus import cleaning
from mlray.models import tokenizer

BUCKET = "text"
ROW_GROUP = 20_000
TRAINING_LINES = 30_000
VOCABULARY = 16_000

Texts = dict[str, list[str]]


def read(folder: Path) -> Texts:
    """The distinct lines of each `<lang>.txt.gz`, as ours would clean them, without inner line breaks."""
    return {path.name.split(".")[0]: _read_lines(path) for path in sorted(folder.glob("*.txt.gz"))}


def _read_lines(path: Path) -> list[str]:
    found: dict[str, None] = {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").split("\n"):
        with contextlib.suppress(cleaning.BadRecord):
            found[" ".join(cleaning.clean(line, config.Corpus().max_chars).split())] = None
    return list(found)


def size(texts: Texts) -> int:
    """Bytes of UTF-8."""
    return sum(len(line.encode()) for lines in texts.values() for line in lines)


def sample(distinct: Texts, megabytes: float) -> Texts:
    """Lines of each language in the corpus' own proportions; all repeat where there are too few.

    A few lines are left out, so that the rows make equal windows and an epoch of ours ends with a window.
    """
    copies, share = divmod(megabytes * 1e6 / size(distinct), 1)
    texts = {
        language: lines * int(copies) + [lines[int(i / share)] for i in range(int(len(lines) * share))]
        for language, lines in distinct.items()
    }
    rows = sum(map(len, texts.values()))
    largest = max(texts.values(), key=len)
    del largest[len(largest) - rows % _windows(rows) :]
    return {language: lines for language, lines in texts.items() if lines}


def _windows(rows: int) -> int:
    """Windows of an epoch, each at least as large as the default."""
    return max(rows // config.Corpus().window_rows, 1)


def train_tokenizer(distinct: Texts, folder: Path) -> str:
    """A Unigram tokenizer, trained on lines of all languages in their proportions; returns its folder."""
    lines = list(itertools.chain.from_iterable(distinct.values()))
    settings = config.Tokenizer(algorithm="unigram", vocab_size=VOCABULARY)
    tokens = tokenizer.train(lines[:: max(len(lines) // TRAINING_LINES, 1)], settings)
    tokens.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def write(name: str, texts: Texts, folder: Path, endpoint: str) -> Corpus:
    """Hive-partitioned parquet on S3 and below `folder`, and a file of the same lines."""
    client = boto3.client("s3", endpoint_url=endpoint)
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    files = []
    for language, lines in texts.items():
        key = f"{name}/lang={language}/part-0.parquet"
        path = folder / key
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"text": lines}), path, row_group_size=ROW_GROUP)
        client.upload_file(str(path), BUCKET, key)
        files.append(str(path))
    everything = list(itertools.chain.from_iterable(texts.values()))
    lines_file = folder / f"{name}.txt"
    lines_file.write_text("\n".join(everything), encoding="utf-8", newline="\n")
    return Corpus(
        name=name,
        uri=f"s3://{BUCKET}/{name}",
        files=files,
        lines=str(lines_file),
        megabytes=size(texts) / 1e6,
        documents=len(everything),
        languages=len(texts),
        windows=_windows(len(everything)),
    )
