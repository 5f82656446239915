"""How the workers of a run judge its held-out batches together, and the mean over languages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlray.schema import PackedBatch
from mlray.training.engine import Engine


def turns(engine: Engine, batches: list[PackedBatch]) -> Iterator[tuple[int, PackedBatch, bool]]:
    """The batches that this worker reads: (number, batch, whether it counts).

    Every worker gives the same batches and takes as many turns; one without a batch left repeats another's, which does
    not count, because sharded weights are gathered by all workers together.
    """
    for first in range(0, len(batches), engine.world_size):
        place = first + engine.rank
        yield place, batches[min(place, len(batches) - 1)], place < len(batches)


def with_macro(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The figures of each language, and their mean as `macro` if there are any."""
    if not table:
        return {}
    keys = ("loss", "accuracy", "bits_per_char")
    return {**table, "macro": {key: float(np.mean([row[key] for row in table.values()])) for key in keys}}
