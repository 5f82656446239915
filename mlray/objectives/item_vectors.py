"""Vectors of the texts of items, as `jobs/embed.py` writes them. V vocabulary, W width of a vector."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlray import access, storage
from mlray.config import ConfigError, Storage


@functools.lru_cache(maxsize=1)
def read(uri: str, settings: Storage) -> dict[str, np.ndarray]:
    """The unit vector of each item; of several texts of one that of their mean.

    Raises:
        ConfigError: the file is none of `jobs/embed.py`.
        StorageError: it cannot be reached.
    """
    try:
        with storage.open_input(storage.absolute(uri), settings) as handle:
            found = pq.read_table(handle, columns=["id", "vector"]).combine_chunks()
        names, width = found.column("id").to_pylist(), found.schema.field("vector").type.list_size
        rows = found.column("vector").combine_chunks().flatten().to_numpy().reshape(-1, width)
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        access.raise_if_transport(error, uri, settings)
        raise ConfigError(
            f"recommendation.vectors={uri} is no file of jobs/embed.py with the columns id and vector"
        ) from None
    sums: dict[str, np.ndarray] = {}
    for name, row in zip(names, rows, strict=True):
        sums[name] = sums.get(name, 0.0) + row
    return {name: row / max(float(np.linalg.norm(row)), 1e-12) for name, row in sums.items()}


def table(vectors: dict[str, np.ndarray], tokens: Any) -> np.ndarray:
    """The vectors (V, W) float32 by token, 0 for one without a text."""
    ids = tokens.get_vocab()
    found = np.zeros((len(tokens), len(next(iter(vectors.values())))), np.float32)
    for name, row in vectors.items():
        if name in ids:
            found[ids[name]] = row
    return found
