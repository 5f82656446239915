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
METRICS = (*ROUGES, "METEOR", "exact match")
_STEMMERS = {
    "arabic": ("ar", "ara", "arb"),
    "danish": ("da", "dan"),
    "dutch": ("nl", "nld", "dut"),
    "english": ("en", "eng"),
    "finnish": ("fi", "fin"),
    "french": ("fr", "fra", "fre"),
    "german": ("de", "deu", "ger"),
    "hungarian": ("hu", "hun"),
    "italian": ("it", "ita"),
    "norwegian": ("no", "nor", "nb", "nob"),
    "portuguese": ("pt", "por"),
    "romanian": ("ro", "ron", "rum"),
    "russian": ("ru", "rus"),
    "spanish": ("es", "spa"),
    "swedish": ("sv", "swe"),
}
"""Snowball's stemmer -> the codes of ISO 639-1, -2 and -3 for its language; the Norwegian one is for Bokmål."""
_STEMMER_OF = {code: name for name, codes in _STEMMERS.items() for code in codes}


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
    values_NM = worth(hypotheses, references, language)
    means_RM = labels.resampled_means(values_NM, resamples)
    stages = "exact+stem" if isinstance(_stemmer(language.split("-")[0]), SnowballStemmer) else "exact"
    return {
        name: labels.figure(
            float(values_NM[:, i].mean()),
            means_RM[:, i],
            len(values_NM),
            f"{name}|words:unicode|{labels.drawn(resamples)}"
            + (f"|stages:{stages}" if name == "METEOR" else ""),
        )
        for i, name in enumerate(METRICS)
    }


def worth(hypotheses: Sequence[str], references: Sequence[str], language: str) -> np.ndarray:
    """What each of N texts is worth by each of `METRICS`, (N, 5) from 0 to 1.

    METEOR is NLTK's, which takes 0.5 / n^3 from n words that are all right in a row: equal texts of one word are worth
    0.5, of two 0.94. Equal texts without a word are worth 1 by every metric.
    """
    rouge = RougeScorer(list(ROUGES.values()), tokenizer=_Words())
    stemmer = _stemmer(language.split("-")[0])
    rows = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        words = (languages.words(reference), languages.words(hypothesis))
        same = hypothesis.strip() == reference.strip()
        if same and not words[0]:  # such as "..." or an emoji: nothing to count, and nothing is wrong
            rows.append([1.0] * len(METRICS))
            continue
        found = rouge.score(reference, hypothesis)
        meteor = single_meteor_score(*words, stemmer=stemmer, wordnet=_NoSynonyms())
        rows.append([*(found[name].fmeasure for name in ROUGES.values()), meteor, float(same)])
    return np.array(rows)


@functools.cache
def _stemmer(language: str) -> Any:
    return SnowballStemmer(_STEMMER_OF[language]) if language in _STEMMER_OF else _NoStems()
