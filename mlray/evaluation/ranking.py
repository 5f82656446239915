"""Exact search and the measures of ranked lists.

Shape letters: Q queries, C candidates, H width of a vector, k ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from mlray.evaluation import labels
from mlray.evaluation.report import Figure

DEPTH = 100
"""Ranks that are kept of each query."""
_BLOCK_BYTES = 64 << 20
METRICS = ("R@1", "R@5", "R@10", "MRR", "nDCG@10", f"mAP@{DEPTH}", "accuracy")
OF_ANSWERS = ("accuracy", "MRR")
OF_ONE = ("R@1", "R@5", "R@10", "MRR", "nDCG@10")
"""Those that say something of their own where one candidate is right."""


def top_k(queries_QH: np.ndarray, candidates_CH: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest candidates of each query by inner product, exactly, block by block (ties at the last rank aside).

    Returns:
        Their numbers (Q, k) int64, the nearest first (of equals the lower number), and the products (Q, k) float32.
    """
    candidates = torch.from_numpy(candidates_CH)
    k = min(k, len(candidates))
    numbers = np.empty((len(queries_QH), k), np.int64)
    products = np.empty((len(queries_QH), k), np.float32)
    block = max(_BLOCK_BYTES // (4 * max(len(candidates), 1)), 1)
    for first in range(0, len(queries_QH), block):
        rows = slice(first, first + block)
        scores = torch.from_numpy(queries_QH[rows]) @ candidates.T
        values, found = scores.topk(k, dim=-1)
        # Equal products come in no order from topk: by number then.
        order = np.lexsort((found.numpy(), -values.numpy()), axis=-1)
        numbers[rows] = np.take_along_axis(found.numpy(), order, axis=-1)
        products[rows] = np.take_along_axis(values.numpy(), order, axis=-1)
    return numbers, products


def measures(ranked: Sequence[str], right: set[str]) -> tuple[float, ...]:
    """`METRICS` of one ranked list (trec_eval's recall, recip_rank, ndcg_cut and map; is the first one right), of 1.

    Args:
        ranked: candidates, the nearest first, at most `DEPTH`.
        right: all that are right, at least one.
    """
    hits = [place for place, candidate in enumerate(ranked[:DEPTH], start=1) if candidate in right]
    recalls = (sum(place <= k for place in hits) / len(right) for k in (1, 5, 10))
    gain = sum(1 / math.log2(place + 1) for place in hits if place <= 10)
    best = sum(1 / math.log2(place + 1) for place in range(1, min(len(right), 10) + 1))
    precision = sum(number / place for number, place in enumerate(hits, start=1)) / len(right)
    return (*recalls, 1 / hits[0] if hits else 0.0, gain / best, precision, float(hits[:1] == [1]))


def reciprocal_rank(predicted: str, truth: str) -> float:
    """The MRR of one list, of 1: names of ranked candidates and of the right ones, with a space between."""
    return measures(predicted.split(), set(truth.split()))[METRICS.index("MRR")]


def score(
    predicted: Sequence[str], truth: Sequence[str], resamples: int, names: Sequence[str] = METRICS
) -> dict[str, Figure]:
    """Measures over queries in percent, with bootstrap intervals.

    Args:
        predicted: of each query the names of the candidates, the nearest first, with a space between.
        truth: the names of the right ones.
        resamples: of the bootstrap.
        names: those of `METRICS` that are wanted.
    """
    table = np.array([measures(p.split(), set(t.split())) for p, t in zip(predicted, truth, strict=True)])
    columns = dict(zip(METRICS, table.T, strict=True))
    return labels.shares({name: columns[name] for name in names}, resamples)
