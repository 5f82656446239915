"""Vectors of every text of a source, made by actors on Ray Data, in the order of the input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray.data

from mlray.access import StorageError
from mlray.config import Cluster, Source, Storage
from mlray.corpus import lines, records, scan, sources, stream
from mlray.corpus.sources import SourceFile

_CHUNK_BYTES = 4 << 20
_TEXTS, _QUERIES = 2048, 512
"""Of a block."""
Search = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(queries, pool, k) -> numbers and products of the nearest."""


Read = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""(texts, their languages or markets) -> unit vectors, one a text, float32."""


class Embedder(Protocol):
    """What makes vectors of texts."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, one a text, float32."""
        ...


class _Embed:
    """The actor that reads chunks and embeds their texts."""

    def __init__(self, opened: Callable[[], Read], max_chars: int, settings: Storage) -> None:
        self._read, self._max_chars, self._settings = opened(), max_chars, settings

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        for told in batch["chunk"]:
            entry = json.loads(str(told))
            chunk = lines.Chunk(SourceFile.of(entry["file"]), entry["start"], entry["stop"])
            try:
                for group in records.read(chunk, self._max_chars, self._settings):
                    yield self._table(group, chunk)
            except (lines.BrokenChunk, StorageError) as error:  # as data: Ray would wrap it into a traceback
                fault = f"{chunk.file.uri}: {error}"
                columns = ("refused", "id", "title", "language", "vector")
                yield {"fault": [fault], **{name: [[]] for name in columns}}

    def _table(self, group: list[Any], chunk: lines.Chunk) -> dict[str, Any]:
        group = [
            record if record.key or record.reason else record._replace(reason="no id") for record in group
        ]
        good = [record for record in group if not record.reason]
        vectors = self._read([record.text for record in good], [record.language for record in good])
        places = [
            f"{chunk.file.uri}: {scan.where(chunk, record.row)}: {record.reason}"
            for record in group
            if record.reason
        ]
        return {
            "fault": [""],
            "refused": [places],
            "id": [[record.key for record in good]],
            "title": [[record.pair or record.text.split("\n", 1)[0] for record in good]],
            "language": [[record.language for record in good]],
            "vector": [vectors.ravel()],
        }


def embed(
    source: Source, opened: Callable[[], Read], cluster: Cluster, max_chars: int, settings: Storage
) -> Iterator[tuple[pa.Table, list[str]]]:
    """Tables of `id` (the cell of `part_by`), `title` (`pair`, else the first line), `language`, `vector`; bad rows.

    Args:
        source: what is read.
        opened: makes the encoder, in each of `cluster.num_workers` actors.
        cluster: how many actors, and what each asks for.
        max_chars: a longer text is a bad row.
        settings: of the storage.

    Raises:
        ConfigError: the source cannot be mapped.
        StorageError: a file cannot be reached, or the rest of one is damaged.
    """
    found = sources.list_files((source,), settings)
    chunks = [
        {"chunk": json.dumps({"file": asdict(file), "start": chunk.start, "stop": chunk.stop})}
        for file in found
        for chunk in records.chunks(file, _CHUNK_BYTES, settings)
    ]
    dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks))
    rows = _on_actors(dataset, _Embed, (opened, max_chars, settings), 1, cluster)
    for row in rows.iter_rows():
        if row["fault"]:
            raise StorageError(row["fault"])
        yield _table(row), list(row["refused"])


class _EmbedTexts:
    """The actor that embeds blocks of texts."""

    def __init__(self, opened: Callable[[], Embedder]) -> None:
        self._embedder = opened()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"vector": self._embedder.embed([str(text) for text in batch["text"]])}


def of_texts(texts: Sequence[str], opened: Callable[[], Embedder], cluster: Cluster) -> np.ndarray:
    """The vectors of texts that are in memory (N, H) float32; see `embed`."""
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    dataset = ray.data.from_arrow([table.slice(first, _TEXTS) for first in range(0, len(table), _TEXTS)])
    rows = _on_actors(dataset, _EmbedTexts, (opened,), _TEXTS, cluster)
    parts = [np.stack(list(batch["vector"])) for batch in rows.iter_batches(batch_size=_TEXTS)]
    return np.concatenate(parts).astype(np.float32)


class _Nearest:
    """The actor that searches a pool."""

    def __init__(self, pool: Any, search: Search, k: int) -> None:
        self._pool, self._search, self._k = ray.get(pool), search, k

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        numbers, products = self._search(np.stack(list(batch["query"])), self._pool, self._k)
        return {"numbers": numbers, "products": products}


def nearest(
    queries_QH: np.ndarray, pool_CH: np.ndarray, k: int, search: Search, cluster: Cluster
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of a pool: numbers (Q, k) and products (Q, k), by `search`, in actors that share the pool."""
    blocks = [
        pa.table({"query": pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1])})
        for first in range(0, len(queries_QH), _QUERIES)
        for part in [queries_QH[first : first + _QUERIES]]
    ]
    dataset = ray.data.from_arrow(blocks)
    found = _on_actors(dataset, _Nearest, (ray.put(pool_CH), search, k), _QUERIES, cluster)
    parts = [
        (np.stack(list(batch["numbers"])), np.stack(list(batch["products"])))
        for batch in found.iter_batches(batch_size=_QUERIES)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _on_actors(
    dataset: ray.data.Dataset, kind: type, arguments: tuple[Any, ...], rows: int, cluster: Cluster
) -> ray.data.Dataset:
    """What actors make of batches, in order."""
    dataset.context.execution_options = stream.execution_options()
    dataset.context.enable_progress_bars = False
    return dataset.map_batches(
        kind,
        fn_constructor_args=arguments,
        batch_size=rows,
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=cluster.num_workers),
    )


def _table(row: dict[str, Any]) -> pa.Table:
    count = len(row["id"])
    flat = np.asarray(row["vector"], dtype=np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), len(flat) // count if count else 1)
    names = ["id", "title", "language"]
    told = [pa.array(list(row[name]), pa.string()) for name in names]
    return pa.table([*told, vectors], names=[*names, "vector"])
