"""Scores of labels: of texts by scikit-learn, of the spans that tags mark by seqeval, with bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics

from mlray.evaluation.report import Figure

SEED = 12345


def score_texts(predicted: Sequence[str], truth: Sequence[str], resamples: int) -> dict[str, Figure]:
    """Accuracy, macro F1 and Matthews' correlation of one label a text, in percent."""
    labels = sorted({*predicted, *truth})
    numbers = {label: number for number, label in enumerate(labels)}
    p, t = (np.array([numbers[label] for label in side]) for side in (predicted, truth))

    def macro_f1(p: np.ndarray, t: np.ndarray) -> float:
        return float(metrics.f1_score(t, p, average="macro", zero_division=0.0))

    def mcc(p: np.ndarray, t: np.ndarray) -> float:
        return float(metrics.matthews_corrcoef(t, p))

    scorers: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "accuracy": lambda p, t: float((p == t).mean()),
        "macro F1": macro_f1,
        "MCC": mcc,
    }
    resampled = draws(len(t), resamples)
    result = {}
    for name, score in scorers.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resample may lack a label
            spread = [score(p[rows], t[rows]) for rows in resampled]
        result[name] = figure(score(p, t), spread, len(t), f"scikit-learn|{name}|bs:{resamples}|seed:{SEED}")
    return result


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
