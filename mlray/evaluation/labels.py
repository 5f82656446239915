"""Scores of labels: of texts, of the spans that tags mark (found by seqeval) and of ranks, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from mlray.evaluation.report import Figure

SEED = 12345


def score_texts(predicted: Sequence[str], truth: Sequence[str], resamples: int) -> dict[str, Figure]:
    """Accuracy (with one label a text also the micro F1), macro F1 and Matthews' correlation, in percent.

    All three follow from the counts of each (true, predicted) pair, as scikit-learn computes them; counting is what
    makes a thousand resamples of every language cheap.
    """
    labels = sorted({*predicted, *truth})
    numbers = {label: number for number, label in enumerate(labels)}
    p, t = (np.array([numbers[label] for label in side]) for side in (predicted, truth))
    cells, size = t * len(labels) + p, len(labels) ** 2

    def scores(rows: np.ndarray | slice) -> tuple[float, float, float]:
        return _text_scores(np.bincount(cells[rows], minlength=size).reshape(len(labels), len(labels)))

    whole = scores(slice(None))
    spread = np.array([scores(rows) for rows in draws(len(t), resamples)])
    return {
        name: figure(whole[i], spread[:, i], len(t), f"confusion|{name}|bs:{resamples}|seed:{SEED}")
        for i, name in enumerate(("accuracy", "macro F1", "MCC"))
    }


def _text_scores(counts_KK: np.ndarray) -> tuple[float, float, float]:
    """Accuracy, macro F1 over the labels that occur, and correlation (Gorodkin 2004); rows are the truth."""
    counts_KK = counts_KK.astype(np.float64)
    right, there, said = np.diag(counts_KK), counts_KK.sum(axis=1), counts_KK.sum(axis=0)
    n = counts_KK.sum()
    occurs = there + said > 0
    f1 = 2 * right[occurs] / (there + said)[occurs]
    scale = np.sqrt((n**2 - said @ said) * (n**2 - there @ there))
    correlation = (right.sum() * n - said @ there) / scale if scale else 0.0
    return float(right.sum() / n), float(f1.mean()), float(correlation)


def score_words(
    predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], resamples: int
) -> dict[str, Figure]:
    """F1, precision and recall of whole spans (CoNLL's measure, micro average), in percent; sentences are resampled."""
    counts = span_counts(predicted, truth)
    resampled = draws(len(counts), resamples)
    names = ("span F1", "precision", "recall")
    whole = _span_scores(counts.sum(axis=0))
    spread = np.array([_span_scores(counts[rows].sum(axis=0)) for rows in resampled])
    return {
        name: figure(whole[i], spread[:, i], len(counts), f"seqeval|{name}|micro|bs:{resamples}|seed:{SEED}")
        for i, name in enumerate(names)
    }


def score_answers(predicted: Sequence[str], truth: Sequence[str], resamples: int) -> dict[str, Figure]:
    """Of ranked sentences: how often the first is right (accuracy) and the mean of 1 / rank (MRR), in percent.

    Args:
        predicted: numbers of the sentences, the likeliest first, with a space between.
        truth: the number of the right one.
        resamples: of the bootstrap.
    """
    inverse = np.array([reciprocal_rank(p, t) for p, t in zip(predicted, truth, strict=True)])
    resampled = draws(len(inverse), resamples)
    columns = {"accuracy": (inverse == 1.0).astype(np.float64), "MRR": inverse}
    return {
        name: figure(
            float(column.mean()),
            column[resampled].mean(axis=1),
            len(column),
            f"{name}|bs:{resamples}|seed:{SEED}",
        )
        for name, column in columns.items()
    }


def reciprocal_rank(predicted: str, truth: str) -> float:
    """1 / the rank of the right number, 0 if it is not there."""
    ranked = predicted.split()
    return 1.0 / (ranked.index(truth) + 1) if truth in ranked else 0.0


def span_counts(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> np.ndarray:
    """Of each sentence (N, 3): spans that are right, predicted, and there."""
    return np.array([_counts(p, t) for p, t in zip(predicted, truth, strict=True)], dtype=np.float64)


def _counts(predicted: Sequence[str], truth: Sequence[str]) -> tuple[int, int, int]:
    p, t = (set(get_entities(list(side))) for side in (predicted, truth))
    return len(p & t), len(p), len(t)


def _span_scores(counts: np.ndarray) -> tuple[float, float, float]:
    right, predicted, there = counts
    precision = right / predicted if predicted else 0.0
    recall = right / there if there else 0.0
    f1 = 2 * right / (predicted + there) if predicted + there else 0.0
    return float(f1), float(precision), float(recall)


def draws(n: int, resamples: int) -> np.ndarray:
    """Rows of each resample (resamples, n), with a fixed seed."""
    return np.random.default_rng(SEED).integers(0, n, size=(resamples, n))


def figure(value: float, spread: Sequence[float] | np.ndarray, n: int, signature: str) -> Figure:
    """A share in percent with the 95 % interval of its resamples."""
    low, high = np.percentile(spread, [2.5, 97.5])
    return Figure(100 * value, 100 * float(low), 100 * float(high), n, signature)
