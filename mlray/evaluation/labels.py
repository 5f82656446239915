"""Scores of labels: of texts, of tags (the spans that they mark, found by seqeval) and of ranks, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from mlray.evaluation.report import Figure

SEED = 12345
TEXT_METRICS = ("accuracy", "macro F1", "MCC")
SPAN_METRICS = ("span F1", "macro span F1", "precision", "recall")
WORD_METRICS = ("accuracy", "macro F1")
"""Of tags that mark no spans, such as parts of speech: the micro F1 over words is their accuracy."""
Unit = tuple[str, int, int]
"""Type, first and last word."""
_BIOES = {"L": "E", "U": "S"}
_AT_ONCE = 1 << 20
"""Rows and counts of the resamples that are held at a time: all of a large test set would fill the memory."""


def score_texts(predicted: Sequence[str], truth: Sequence[str], resamples: int) -> dict[str, Figure]:
    """Accuracy, macro F1 and Matthews' correlation, in percent.

    The micro F1 over all classes is the accuracy, as each text has one label.
    """
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


def _per_label(numbers_RN: np.ndarray, labels: int, times_RN: np.ndarray | None = None) -> np.ndarray:
    """How often each label stands in each row (R, K), where each place counts so many times."""
    rows = len(numbers_RN)
    cells_RN = numbers_RN + labels * np.arange(rows)[:, None]
    weights = None if times_RN is None else times_RN.ravel()
    return np.bincount(cells_RN.ravel(), weights, rows * labels).reshape(rows, labels).astype(np.float64)


def score_words(
    predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], resamples: int, *, spans: bool = True
) -> dict[str, Figure]:
    """`SPAN_METRICS` of whole spans (CoNLL's measure) or `WORD_METRICS` of words, in percent; sentences are resampled.

    Micro averages but for the macro F1, the mean over the types of entities, or the tags, that occur.
    """
    units = [(_units(p, spans), _units(t, spans)) for p, t in zip(predicted, truth, strict=True)]
    sentences_P, types_P, counts_P3 = _by_type(units)
    types = int(types_P.max(initial=0)) + 1
    names = SPAN_METRICS if spans else WORD_METRICS

    def scores(times_RN: np.ndarray) -> np.ndarray:
        times_RP = times_RN[:, sentences_P]
        types_RP = np.broadcast_to(types_P, times_RP.shape)
        return _unit_scores(*(_per_label(types_RP, types, times_RP * side_P) for side_P in counts_P3.T))

    whole = scores(np.ones((1, len(truth))))[0]
    parts = draws(len(truth), resamples, width=len(truth) + len(types_P) + types)
    spread = np.concatenate([scores(_per_label(rows_RN, len(truth))) for rows_RN in parts])
    kind = "seqeval" if spans else "words"
    return {
        name: figure(
            float(whole[i]),
            spread[:, i],
            len(truth),
            f"{kind}|{name}|{'macro' if 'macro' in name else 'micro'}|{drawn(resamples)}",
        )
        for i, name in enumerate(names)
    }


def _by_type(
    units: Sequence[tuple[set[Unit], set[Unit]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each type in each sentence, as P places: the sentence (P,), the type's number (P,), its `span_counts` (P, 3)."""
    numbers: dict[str, int] = {}
    rows = []
    for sentence, (said, there) in enumerate(units):
        sides = [Counter(kind for kind, *_ in side) for side in (said & there, said, there)]
        for kind in sorted(sides[1] | sides[2]):
            number = numbers.setdefault(kind, len(numbers))
            rows.append((sentence, number, *(side[kind] for side in sides)))
    table = np.array(rows, dtype=np.int64).reshape(-1, 5)
    return table[:, 0], table[:, 1], table[:, 2:]


def _unit_scores(right_RK: np.ndarray, said_RK: np.ndarray, there_RK: np.ndarray) -> np.ndarray:
    """Micro F1, macro F1 over the types that occur, precision and recall: (R, 4); a share of nothing is 0."""
    either_RK = said_RK + there_RK
    f1_RK = 2 * right_RK / np.maximum(either_RK, 1)
    right, said, there = (side_RK.sum(axis=1) for side_RK in (right_RK, said_RK, there_RK))
    return np.stack(
        [
            2 * right / np.maximum(said + there, 1),
            f1_RK.sum(axis=1) / np.maximum((either_RK > 0).sum(axis=1), 1),
            right / np.maximum(said, 1),
            right / np.maximum(there, 1),
        ],
        axis=1,
    )


def span_counts(
    predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]], *, spans: bool = True
) -> np.ndarray:
    """Of each sentence (N, 3): spans (or words with their tags) that are right, predicted, and there."""
    pairs = ((_units(p, spans), _units(t, spans)) for p, t in zip(predicted, truth, strict=True))
    return np.array([(len(p & t), len(p), len(t)) for p, t in pairs], dtype=np.float64)


def _units(tags: Sequence[str], spans: bool) -> set[Unit]:
    """Type, first and last word of each span, or of each word."""
    if not spans:
        return {(tag, place, place) for place, tag in enumerate(tags)}
    # The last and the only word of a span are L- and U- in BILOU, and seqeval reads E- and S-.
    return set(get_entities([_BIOES.get(tag[0], tag[0]) + tag[1:] for tag in tags]))


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
