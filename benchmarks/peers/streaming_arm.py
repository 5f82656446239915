"""The arm of the input benchmark for MosaicML streaming, in an environment of its own.

    python -m venv VENV && VENV/bin/pip install -r benchmarks/peers/streaming.txt
    python benchmarks/input_pipeline.py --streaming-python VENV/bin/python

The shards (MDS, one text a sample) are written to the S3 server once, outside the clock. Every run starts
with an empty local cache and downloads them; the loader's workers tokenise and pad in `collate_fn`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import arm
import numpy as np
import streaming
import streaming.base.util
import tokenizers
import torch
from arm import Batch, Batches, Corpus, Setup


@contextlib.contextmanager
def mosaic(setup: Setup) -> Iterator[Batches]:
    """`StreamingDataset` over S3 and a `DataLoader` with a worker for each core."""
    os.environ["S3_ENDPOINT_URL"] = setup.endpoint
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers fill the cores
    cache = Path(setup.scratch) / "cache"
    written = Path(setup.scratch) / "written"
    if not written.exists():
        for corpus in {_shards(corpus): corpus for corpus in setup.corpora.values()}.values():
            _write(corpus)
        written.touch()
    streaming.base.util.clean_stale_shared_memory()

    def batches(corpus: Corpus) -> Iterator[Batch]:
        rows = streaming.StreamingDataset(
            remote=_shards(corpus), local=str(cache / corpus.name), batch_size=setup.batch_rows
        )
        loader = torch.utils.data.DataLoader(
            rows,
            batch_size=setup.batch_rows,
            num_workers=setup.cores,
            collate_fn=_Collate(setup.tokenizer, setup.sequence_length),
        )
        for ids, mask in loader:
            yield arm.padded(ids.numpy(), mask.numpy())

    yield batches
    shutil.rmtree(cache, ignore_errors=True)


class _Collate:
    """Tokenises the texts of a batch and pads them to the longest."""

    def __init__(self, folder: str, sequence_length: int) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        self._tokenizer.enable_truncation(sequence_length)
        self._tokenizer.enable_padding(pad_id=self._tokenizer.token_to_id("<pad>"), pad_token="<pad>")

    def __call__(self, rows: list[dict[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        encodings = self._tokenizer.encode_batch_fast([row["text"] for row in rows])
        ids = np.array([encoding.ids for encoding in encodings])
        mask = np.array([encoding.attention_mask for encoding in encodings])
        return torch.from_numpy(ids), torch.from_numpy(mask)


def _shards(corpus: Corpus) -> str:
    return f"{corpus.uri}-mds"


def _write(corpus: Corpus) -> None:
    with (
        streaming.MDSWriter(out=_shards(corpus), columns={"text": "str"}, progress_bar=False) as writer,
        Path(corpus.lines).open(encoding="utf-8", newline="\n") as lines,
    ):
        for line in lines:
            writer.write({"text": line.removesuffix("\n")})


if __name__ == "__main__":
    arm.serve(mosaic)
