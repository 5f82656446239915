"""Scores of labels: of texts, of the spans that tags mark (found by seqeval) and of ranks, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from mlray.evaluation.report import Figure

SEED = 12345
TEXT_METRICS = ("accuracy", "macro F1", "MCC")
_AT_ONCE = 1 << 20
"""Rows and counts of the resamples that are held at a time: all of a large test set would fill the memory."""


def score_texts(predicted: Sequence[str], truth: Sequence[str], resamples: int) -> dict[str, Figure]:
    """Accuracy (with one label a text also the micro F1), macro F1 and Matthews' correlation, in percent."""
    whole, spread = text_scores(predicted, truth, resamples)
    return {
        name: figure(float(whole[i]), spread[:, i], len(truth), f"confusion|{name}|{drawn(resamples)}")
        for i, name in enumerate(TEXT_METRICS)
    }


def text_scores(
    predicted: Sequence[str], truth: Sequence[str], resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """`TEXT_METRICS` (3,) of all texts and (resamples, 3) of resamples, whose rows depend on the number of texts alone.

    All three follow from how often a label is there, is said, and is right, and are those of scikit-learn. So nothing
    grows with the square of the labels, of which a model that writes freely invents thousands.
    """
    numbers = {label: number for number, label in enumerate(sorted({*predicted, *truth}))}
    p_N, t_N = (np.array([numbers[label] for label in side]) for side in (predicted, truth))
    parts = draws(len(t_N), resamples, width=len(t_N) + len(numbers))
    spread = [_text_scores(p_N[rows_RN], t_N[rows_RN], len(numbers)) for rows_RN in parts]
    return _text_scores(p_N[None], t_N[None], len(numbers))[0], np.concatenate(spread)


def _text_scores(p_RN: np.ndarray, t_RN: np.ndarray, labels: int) -> np.ndarray:
    """Accuracy, macro F1 over the labels that occur, and correlation (Gorodkin 2004): (R, 3) of R resamples."""
    there_RK, said_RK = _per_label(t_RN, labels), _per_label(p_RN, labels)
    right_RK = _per_label(t_RN, labels, p_RN == t_RN)
    n, right = t_RN.shape[1], right_RK.sum(axis=1)
    either_RK = there_RK + said_RK
    f1 = (2 * right_RK / np.maximum(either_RK, 1)).sum(axis=1) / (either_RK > 0).sum(axis=1)
    both, alone = (said_RK * there_RK).sum(axis=1), [(side**2).sum(axis=1) for side in (said_RK, there_RK)]
    scale = np.sqrt((n**2 - alone[0]) * (n**2 - alone[1]))
    correlation = np.where(scale > 0, (right * n - both) / np.where(scale > 0, scale, 1), 0.0)
    return np.stack([right / n, f1, correlation], axis=1)


def _per_label(numbers_RN: np.ndarray, labels: int, which_RN: np.ndarray | None = None) -> np.ndarray:
    """How often each label stands in each row (R, K), where `which` is true."""
    rows = len(numbers_RN)
    cells_RN = numbers_RN + labels * np.arange(rows)[:, None]
    weights = None if which_RN is None else which_RN.ravel()
    return np.bincount(cells_RN.ravel(), weights, rows * labels).reshape(rows, labels).astype(np.float64)


def score_words(
    predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], resamples: int
) -> dict[str, Figure]:
    """F1, precision and recall of whole spans (CoNLL's measure, micro average), in percent; sentences are resampled."""
    counts = span_counts(predicted, truth)
    names = ("span F1", "precision", "recall")
    whole = _span_scores(counts.sum(axis=0))
    parts = draws(len(counts), resamples, width=counts.size)
    spread = np.array([_span_scores(sums) for rows_RN in parts for sums in counts[rows_RN].sum(axis=1)])
    return {
        name: figure(whole[i], spread[:, i], len(counts), f"seqeval|{name}|micro|{drawn(resamples)}")
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
    return shares({"accuracy": (inverse == 1.0).astype(np.float64), "MRR": inverse}, resamples)


def reciprocal_rank(predicted: str, truth: str) -> float:
    """1 / the rank of the first right name, 0 if none is there.

    Args:
        predicted: names of ranked candidates, the likeliest first, with a space between.
        truth: the names of the right ones.
    """
    right = set(truth.split())
    return next((1 / place for place, one in enumerate(predicted.split(), start=1) if one in right), 0.0)


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


def shares(columns: dict[str, np.ndarray], resamples: int) -> dict[str, Figure]:
    """The mean of each column of shares in percent, with its interval."""
    values_NM = np.stack(list(columns.values()), axis=1)
    means_RM = resampled_means(values_NM, resamples)
    return {
        name: figure(
            float(values_NM[:, i].mean()), means_RM[:, i], len(values_NM), f"{name}|{drawn(resamples)}"
        )
        for i, name in enumerate(columns)
    }


def drawn(resamples: int) -> str:
    """The end of a signature: how the interval was made."""
    return f"bs:{resamples}|seed:{SEED}"


def resampled_means(values_NM: np.ndarray, resamples: int) -> np.ndarray:
    """The mean of each column in each resample, (resamples, M)."""
    parts = draws(len(values_NM), resamples, width=values_NM.size)
    return np.concatenate([values_NM[rows_RN].mean(axis=1) for rows_RN in parts])


def draws(n: int, resamples: int, width: int) -> Iterator[np.ndarray]:
    """Rows of each resample in parts (R, n), with a fixed seed; a resample takes `width` numbers of memory."""
    draw = np.random.default_rng(SEED)
    part = max(_AT_ONCE // width, 1)
    for first in range(0, resamples, part):
        yield draw.integers(0, n, size=(min(part, resamples - first), n))


def figure(value: float, spread: Sequence[float] | np.ndarray, n: int, signature: str) -> Figure:
    """A share in percent with the 95 % interval of its resamples."""
    low, high = np.percentile(spread, [2.5, 97.5])
    return Figure(100 * value, 100 * float(low), 100 * float(high), n, signature)
