"""Scores of translations: sacreBLEU's BLEU (Papineni et al. 2002), chrF (Popovic 2015) and TER (Snover et al. 2006).

The tokenizer follows the target language and the script of the references; TER gets its tokens where words are not
written apart, as TER's own know spaces only and a sentence would be one word. Every figure carries sacreBLEU's
signature and a bootstrap interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from mlray import languages
from mlray.config import ConfigError
from mlray.evaluation import labels
from mlray.evaluation.report import Figure


class _Averaged:
    """Resamples have a mean: sacreBLEU 2.6.0 fails where some score nothing (float) and others do not (float32)."""

    def _compute_score_from_stats(self, stats: Any) -> Any:
        found = super()._compute_score_from_stats(stats)  # type: ignore[misc]
        found.score = float(found.score)
        return found


class _Bleu(_Averaged, BLEU):
    pass


class _Chrf(_Averaged, CHRF):
    pass


class _Ter(_Averaged, TER):
    """Edits of the words that BLEU's tokenizer gives, named at the signature's end; with `13a` of TER's own."""

    def __init__(self, tokenizer: str):
        super().__init__()
        self._words = tokenizer
        self._cut = str if tokenizer == "13a" else BLEU(tokenize=tokenizer).tokenizer

    def _preprocess_segment(self, sent: str) -> str:
        return str(super()._preprocess_segment(self._cut(sent)))

    def get_signature(self) -> Any:
        own = super().get_signature()
        return own if self._words == "13a" else f"{own}|words:{self._words}"


def metrics(language: str, references: Sequence[str]) -> dict[str, Any]:
    """sacreBLEU's BLEU, chrF and TER for texts in a language, which the references show the script of."""
    tokenizer = languages.metric_tokenizer(language, references)
    return {"BLEU": _Bleu(tokenize=tokenizer), "chrF": _Chrf(), "TER": _Ter(tokenizer)}


def score(
    hypotheses: Sequence[str], references: Sequence[str], language: str, resamples: int
) -> dict[str, Figure]:
    """BLEU, chrF and TER of a corpus in percent, each with its 95 % interval.

    Args:
        hypotheses: what the model wrote.
        references: one for each.
        language: tag of the language they are in.
        resamples: of the bootstrap.

    Raises:
        ConfigError: the two are of different length, or a reference is empty.
    """
    if len(hypotheses) != len(references):
        raise ConfigError(f"{len(hypotheses)} hypotheses do not fit {len(references)} references")
    for row, reference in enumerate(references):
        if not reference.strip():
            raise ConfigError(f"the reference of row {row} in {language!r} is empty")
    return {
        name: _figure(metric, hypotheses, references, resamples)
        for name, metric in metrics(language, references).items()
    }


def _figure(metric: Any, hypotheses: Sequence[str], references: Sequence[str], resamples: int) -> Figure:
    """The score and sacreBLEU's own interval, drawn in parts: sacreBLEU holds all resamples, 7 GB of 100,000 rows."""
    rows = metric._extract_corpus_statistics(hypotheses, [references])
    found = metric._aggregate_and_compute(rows)
    half = 0.0
    if len(rows) > 1:
        rows_NK = np.array(rows, dtype=np.float32)
        found.estimate_ci(
            [
                metric._compute_score_from_stats(sample_NK.sum(0))
                for part_RN in labels.draws(len(rows), resamples, width=rows_NK.size)
                for sample_NK in rows_NK[part_RN]
            ]
        )
        half = float(found._ci)
        metric.n_bootstrap, metric.seed = resamples, labels.SEED  # for the signature
    most = math.inf if isinstance(metric, TER) else 100.0  # more edits than words are possible
    low, high = max(found.score - half, 0.0), min(found.score + half, most)
    return Figure(found.score, low, high, len(rows), str(metric.get_signature()))
