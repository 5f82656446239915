"""Vectors of a whole set, written as one parquet file."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from mlray import storage
from mlray.config import ConfigError, RunConfig, Source
from mlray.console import left_out
from mlray.corpus import vectors
from mlray.models import backbone, embedder
from mlray.objectives.embedding import TextEmbedder
from mlray.training import placement


def embed(config: RunConfig, model: str, source: Source, output: str) -> int:
    """Writes `id` and `vector` of every text of a source, in its order; returns how many.

    Rows without a text, language or id are left out, counted, and the first of them named.

    Raises:
        ConfigError: the model is no encoder, or the source cannot be mapped.
        RunError: storage failed; then nothing is written.
    """
    backbone.quiet()
    model, output = storage.absolute(model), storage.absolute(output)
    opened = opener(config, model)
    opened()  # what is no encoder is told before anything starts
    placement.connect(config)
    written, width, refused = 0, 0, list[str]()
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,} texts"))
    off = not sys.stderr.isatty()
    with storage.staging() as stage, Progress(*columns, console=console, transient=True, disable=off) as bar:
        work, path = bar.add_task("", total=None), stage / "vectors.parquet"
        writer: pq.ParquetWriter | None = None
        for table, left_out in vectors.embed(
            source,
            functools.partial(_reader, opened),
            config.cluster,
            config.corpus.max_chars,
            config.storage,
        ):
            refused += left_out
            table = table.select(["id", "vector"])
            if len(table):
                writer = writer or pq.ParquetWriter(path, table.schema.with_metadata({"model": model}))
                writer.write_table(table.cast(writer.schema))
                written, width = written + len(table), _width(table)
                bar.advance(work, len(table))
        if writer is None:
            raise ConfigError(f"{source.uri} holds no text that can be embedded" + _told(refused))
        writer.close()
        storage.upload(path, output, config.storage)
    print(f"{written:,} vectors of {width} dimensions{_told(refused)}\nvectors     {output}")
    return written


def opener(config: RunConfig, model: str) -> Callable[[], TextEmbedder]:
    """What opens the encoder at a folder or `s3://` prefix, in whatever process, as the family that it names.

    Raises:
        ConfigError: there is no checkpoint, or it is no encoder.
    """
    named = embedder.checkpoint_of(config.model, model, config.storage)
    return functools.partial(open_embedder, config.model_copy(update={"model": named}), model)


def _reader(opened: Callable[[], TextEmbedder]) -> vectors.Read:
    """Reads texts of any language alike."""
    embedder = opened()
    return lambda texts, _: embedder.embed(texts)


def open_embedder(config: RunConfig, model: str) -> TextEmbedder:
    """The encoder at a folder or `s3://` prefix."""
    with storage.local_copy(model, config.storage) as folder:
        return TextEmbedder(config, folder, device="cuda" if config.cluster.gpus_per_worker else "cpu")


def _told(refused: list[str]) -> str:
    return f"; {left_out(refused)}" if refused else ""


def _width(table: pa.Table) -> int:
    return int(table.schema.field("vector").type.list_size)
