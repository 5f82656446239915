"""The arms of the input benchmark that run in this project's environment; `input_pipeline.py` starts each.

    python benchmarks/input_arms.py NAME SETUP_JSON

See `arm` for what stands inside and outside the clock.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import arm
import numpy as np
import pyarrow.fs
import tokenizers
from arm import Arm, Batch, Batches, Corpus, Setup

_CHUNK = 8192


@contextlib.contextmanager
def bare(setup: Setup) -> Iterator[Batches]:
    """The limit: `encode_batch_fast` on all cores over texts in memory; no batches are made."""
    tokenizer = tokenizers.Tokenizer.from_file(f"{setup.tokenizer}/tokenizer.json")
    texts = {
        name: Path(corpus.lines).read_text(encoding="utf-8").splitlines()
        for name, corpus in setup.corpora.items()
    }

    def batches(corpus: Corpus) -> Iterator[Batch]:
        lines = texts[corpus.name]
        for start in range(0, len(lines), _CHUNK):
            encodings = tokenizer.encode_batch_fast(lines[start : start + _CHUNK])
            tokens = sum(map(len, encodings))
            yield Batch(len(encodings), tokens, tokens, len(encodings), functools.partial(_inner, encodings))

    yield batches


def _inner(encodings: list[tokenizers.Encoding]) -> Iterator[tuple[None, np.ndarray]]:
    for encoding in encodings:
        yield None, np.array(encoding.ids[1:-1], dtype=np.int32)


@contextlib.contextmanager
def hf_streaming(setup: Setup) -> Iterator[Batches]:
    """`datasets` streaming, `map(batched=True)` in the loader's workers, padding to the longest."""
    import datasets

    tokenizer, collate = _transformers(setup)

    def batches(corpus: Corpus) -> Iterator[Batch]:
        rows = datasets.load_dataset("parquet", data_files=corpus.files, split="train", streaming=True)
        tokens = rows.map(_encode(tokenizer, setup), batched=True, remove_columns=["text"])
        return _load(tokens, collate, setup)

    yield batches


@contextlib.contextmanager
def hf_map(setup: Setup) -> Iterator[Batches]:
    """`datasets.map` in two processes to an Arrow cache on disk, then a loader with the same padding."""
    import datasets

    tokenizer, collate = _transformers(setup)
    cache = Path(setup.scratch) / "datasets"

    def batches(corpus: Corpus) -> Iterator[Batch]:
        rows = datasets.load_dataset(
            "parquet", data_files=corpus.files, split="train", cache_dir=str(cache / corpus.name)
        )
        tokens = rows.map(_encode(tokenizer, setup), batched=True, remove_columns=["text"], num_proc=2)
        return _load(tokens, collate, setup)

    yield batches
    shutil.rmtree(cache, ignore_errors=True)


def _transformers(setup: Setup) -> tuple[Any, Any]:
    import datasets
    import torch  # noqa: F401  before the clock
    import transformers

    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(setup.tokenizer)
    return tokenizer, transformers.DataCollatorWithPadding(tokenizer, padding="longest")


def _encode(tokenizer: Any, setup: Setup) -> Any:
    length = setup.sequence_length
    return lambda rows: tokenizer(rows["text"], truncation=True, max_length=length)


def _load(tokens: Any, collate: Any, setup: Setup) -> Iterator[Batch]:
    import torch

    loader = torch.utils.data.DataLoader(
        tokens, batch_size=setup.batch_rows, num_workers=setup.cores, collate_fn=collate
    )
    for batch in loader:
        yield arm.padded(batch["input_ids"].numpy(), batch["attention_mask"].numpy())


@contextlib.contextmanager
def ray_stock(setup: Setup) -> Iterator[Batches]:
    """Ray Data as documented: `read_parquet`, a tokenizer that actors keep, `iter_torch_batches`."""
    import ray.data
    import torch  # noqa: F401  before the clock

    scheme, _, host = setup.endpoint.partition("://")
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=host, scheme=scheme)

    def batches(corpus: Corpus) -> Iterator[Batch]:
        text = ray.data.read_parquet(corpus.uri.removeprefix("s3://"), filesystem=filesystem)
        tokens = text.select_columns(["text"]).map_batches(
            _Tokenise,
            fn_constructor_args=(setup.tokenizer, setup.sequence_length),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=setup.cores),
        )
        for batch in tokens.iter_torch_batches(batch_size=setup.batch_rows, prefetch_batches=2):
            yield arm.padded(batch["input_ids"].numpy(), batch["attention_mask"].numpy())

    with _ray(setup):
        yield batches


class _Tokenise:
    """Pads to the full length: blocks of different widths do not make one tensor."""

    def __init__(self, folder: str, sequence_length: int) -> None:
        import transformers

        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self._length = sequence_length

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = self._tokenizer(
            batch["text"].tolist(),
            truncation=True,
            padding="max_length",
            max_length=self._length,
            return_tensors="np",
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@contextlib.contextmanager
def scan(setup: Setup) -> Iterator[Batches]:
    """Ours, once a corpus: the pass that builds the manifest, which `ours` reads."""
    from mlray.corpus import manifest, sources, stream

    def batches(corpus: Corpus) -> Iterator[Batch]:
        settings, storage = _ours_config(setup, corpus)
        files = sources.list_files(settings.sources, storage)
        made = stream.build_manifest(files, settings, storage, manifest.fingerprint(files, settings))
        manifest.save(made, _manifest_folder(setup, corpus), storage)
        documents = sum(made.documents().values())
        yield Batch(documents, 0, 0, documents, tuple)

    with _ray(setup):
        yield batches


@contextlib.contextmanager
def ours(setup: Setup) -> Iterator[Batches]:
    """`mlray.corpus.stream`: an epoch of shuffled windows, packed, from the manifest on."""
    from mlray.corpus import manifest, packing, stream
    from mlray.corpus.mixture import Mixture
    from mlray.corpus.windows import WindowReader
    from mlray.models import tokenizer
    from mlray.schema import Position

    encoder = tokenizer.encoder(tokenizer.load(setup.tokenizer))

    def batches(corpus: Corpus) -> Iterator[Batch]:
        settings, storage = _ours_config(setup, corpus)
        found = manifest.load(_manifest_folder(setup, corpus), storage)
        mixture = Mixture(found, settings.alpha, settings.window_rows, seed=0)
        start = Position(window=corpus.first_window)
        rows = stream.dataset(
            WindowReader(found, mixture, settings.max_chars, storage),
            packing.Texts(encoder, settings.sequence_length),
            settings,
            start=start,
            num_windows=corpus.windows - corpus.first_window,
            deal=stream.Deal.of(settings, setup.batch_rows, num_workers=1, batches_per_worker=1 << 30),
        )
        for batch in stream.batches(_Whole(rows), setup.batch_rows, start, rank=0):
            tokens, pieces = int(batch.lengths_D.sum()), len(batch.lengths_D)
            yield Batch(len(batch), batch.tokens_BT.size, tokens, pieces, functools.partial(_pieces, batch))

    with _ray(setup) as context:
        context.execution_options = stream.execution_options()
        yield batches


class _Whole:
    """A dataset that also gives its last, incomplete batch."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def iter_batches(self, **options: Any) -> Any:
        return self._dataset.iter_batches(**{**options, "drop_last": False})


def _pieces(batch: Any) -> Iterator[tuple[int, np.ndarray]]:
    flat = batch.tokens_BT[batch.segments_BT > 0]
    for tokens, name in zip(np.split(flat, np.cumsum(batch.lengths_D)[:-1]), batch.documents_D, strict=True):
        yield int(name), tokens[1:-1]


def _manifest_folder(setup: Setup, corpus: Corpus) -> str:
    return f"{setup.scratch}/{corpus.uri.rpartition('/')[2]}"


def _ours_config(setup: Setup, corpus: Corpus) -> tuple[Any, Any]:
    from mlray import config

    settings = config.Corpus(
        sources=(config.Source(uri=corpus.uri, language="partition"),),
        alpha=1.0,
        validation_rows=0,
        window_rows=corpus.documents // corpus.windows,
        sequence_length=setup.sequence_length,
    )
    return settings, config.Storage(endpoint_url=setup.endpoint)


@contextlib.contextmanager
def _ray(setup: Setup) -> Iterator[Any]:
    """A cluster with an idle worker for each core and Ray Data's own actors."""
    import ray
    import ray.data

    ray.init(num_cpus=setup.cores, include_dashboard=False, logging_level="error", log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    ray.data.range(setup.cores, override_num_blocks=setup.cores).map_batches(
        lambda batch: batch
    ).materialize()
    try:
        yield context
    finally:
        ray.shutdown()


ARMS: dict[str, Arm] = {
    function.__name__: function for function in (bare, hf_streaming, hf_map, ray_stock, scan, ours)
}

if __name__ == "__main__":
    arm.serve(ARMS[sys.argv[1]])
