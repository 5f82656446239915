"""Scores of written texts beside BLEU: ROUGE (Lin 2004), METEOR (Banerjee and Lavie 2005), exact match.

rouge-score's own tokenizer knows a-z and 0-9 alone and gives 0 for identical Russian; METEOR's synonyms need a
download. So both get Unicode words, and METEOR its exact and stem stages only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from nltk.stem.snowball import SnowballStemmer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer

from mlray import languages
from mlray.evaluation import labels
from mlray.evaluation.report import Figure

ROUGES = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
_STEMMERS = {
    "ar": "arabic",
    "da": "danish",
    "de": "german",
    "en": "english",
    "es": "spanish",
    "fi": "finnish",
    "fr": "french",
    "hu": "hungarian",
    "it": "italian",
    "nl": "dutch",
    "no": "norwegian",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sv": "swedish",
}


class _Words:
    """rouge-score's seam for a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return languages.words(text)


class _NoSynonyms:
    """METEOR's seam for WordNet."""

    def synsets(self, _: str) -> list[Any]:
        return []


class _NoStems:
    def stem(self, word: str) -> str:
        return word


def score(
    hypotheses: Sequence[str], references: Sequence[str], language: str, resamples: int
) -> dict[str, Figure]:
    """Means over the texts in percent, with 95 % intervals: ROUGE-1, 2, L (F1), METEOR, exact match."""
    rouge = RougeScorer(list(ROUGES.values()), tokenizer=_Words())
    stemmer = _stemmer(language.split("-")[0])
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        found = rouge.score(reference, hypothesis)
        words = (languages.words(reference), languages.words(hypothesis))
        meteor = single_meteor_score(*words, stemmer=stemmer, wordnet=_NoSynonyms())
        same = hypothesis.strip() == reference.strip()
        rows.append([*(found[name].fmeasure for name in ROUGES.values()), meteor, float(same)])
    values = np.array(rows)
    means = values[labels.draws(len(values), resamples)].mean(axis=1)
    names = [*ROUGES, "METEOR", "exact match"]
    stages = "exact+stem" if isinstance(stemmer, SnowballStemmer) else "exact"
    return {
        name: labels.figure(
            float(values[:, i].mean()),
            means[:, i],
            len(values),
            f"{name}|words:unicode|bs:{resamples}|seed:{labels.SEED}"
            + (f"|stages:{stages}" if name == "METEOR" else ""),
        )
        for i, name in enumerate(names)
    }


@functools.cache
def _stemmer(language: str) -> Any:
    return SnowballStemmer(_STEMMERS[language]) if language in _STEMMERS else _NoStems()
