"""Whether one model is better than another on the same rows: paired randomisation, corrected over languages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

SEED = 12345
TRIALS = 10_000
"""So many that a p-value corrected over five hundred tests can still be below 0.05."""
_AT_ONCE = 1 << 22
"""Swaps that are drawn at a time: of large test sets all of them would fill the memory."""


def paired(
    first_NK: np.ndarray, second_NK: np.ndarray, score: Callable[[np.ndarray], np.ndarray], trials: int
) -> float:
    """Two-sided p-value of a difference of scores (approximate randomisation, Noreen 1989).

    Rows are swapped between the two at random; p is the share of the trials whose difference is as large as the real
    one, the real one counted.

    Args:
        first_NK: what each of N rows adds to the K sums that the score is computed from.
        second_NK: the same of the other model.
        score: sums (..., K) -> scores (...).
        trials: random assignments.
    """
    draw = np.random.default_rng(SEED)
    a, b = first_NK.sum(axis=0), second_NK.sum(axis=0)
    observed = abs(float(score(a) - score(b)))
    found, left = 0, trials
    while left:
        part = min(left, max(_AT_ONCE // len(first_NK), 1))
        swaps = draw.random((part, len(first_NK))) < 0.5
        moved = swaps.astype(np.float64) @ (second_NK - first_NK)
        differences = np.abs(score(a + moved) - score(b - moved))
        found += int((differences >= observed - 1e-12).sum())
        left -= part
    return (1 + found) / (1 + trials)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for being many (Holm 1979): the chance of one false alarm in all stays below the level."""
    corrected: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min((len(p_values) - rank) * p_values[name], 1.0))
        corrected[name] = highest
    return {name: corrected[name] for name in p_values}
