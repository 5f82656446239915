"""Scores of translations: sacreBLEU's BLEU (Papineni et al. 2002), chrF (Popovic 2015) and TER (Snover et al. 2006).

The tokenizer follows the target language and the script of the references; TER gets its tokens where words are not
written apart, as TER's own know spaces only and a sentence would be one word. Every figure carries sacreBLEU's
signature and a bootstrap interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.metrics.ter import TER

from mlray import languages
from mlray.config import ConfigError
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
    pass


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
    tokenizer = languages.metric_tokenizer(language, references)
    metrics: dict[str, Any] = {"BLEU": _Bleu(tokenize=tokenizer), "chrF": _Chrf()}
    sides = list(hypotheses), list(references)
    found = {name: _figure(metric, *sides, resamples) for name, metric in metrics.items()}
    if tokenizer == "13a":
        return {**found, "TER": _figure(_Ter(), *sides, resamples)}
    cut = metrics["BLEU"].tokenizer
    words = tuple([cut(text) for text in side] for side in sides)
    ter = _figure(_Ter(), words[0], words[1], resamples)
    return {**found, "TER": dataclasses.replace(ter, signature=f"{ter.signature}|words:{tokenizer}")}


def _figure(metric: Any, hypotheses: list[str], references: list[str], resamples: int) -> Figure:
    plain = float(metric.corpus_score(hypotheses, [references]).score)
    half = 0.0
    if len(hypotheses) > 1:
        half = float(metric.corpus_score(hypotheses, [references], n_bootstrap=resamples)._ci)
    most = math.inf if isinstance(metric, TER) else 100.0  # more edits than words are possible
    low, high = max(plain - half, 0.0), min(plain + half, most)
    return Figure(plain, low, high, len(hypotheses), str(metric.get_signature()))
