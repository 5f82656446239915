"""What a sweep maximises: the mean over the languages, less a share of how far the worst one is behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlray.config import ConfigError, RunError, Sweep
from mlray.corpus.manifest import Manifest


@dataclass(frozen=True)
class Score:
    """A validation of a trial in one number, and what it is made of."""

    objective: float
    macro: float
    worst: float
    worst_language: str
    below: tuple[str, ...]
    """Languages below their floor; a trial with any cannot win."""


def score(scores: Mapping[str, Mapping[str, float]], expected: Iterable[str], settings: Sweep) -> Score:
    """`macro - gap_weight * (macro - worst)`, less what languages lack to their floors.

    Args:
        scores: language -> metric -> value, as a validation gives them.
        expected: the languages that must be there.
        settings: metric, weight and floors.

    Raises:
        RunError: a language is missing, or a value is no number; the trial fails.
    """
    sign = -1.0 if settings.metric == "loss" else 1.0  # the highest is the best
    values = {}
    for language in expected:
        value = scores.get(language, {}).get(settings.metric)
        if value is None or not math.isfinite(value):
            raise RunError(
                f"the validation has no {settings.metric} of {language}, so the trial cannot be judged"
            )
        values[language] = sign * value
    macro = sum(values.values()) / len(values)
    worst_language = min(values, key=lambda language: values[language])
    worst = values[worst_language]
    lacks = {
        language: sign * floor - values[language]
        for language, floor in settings.floors.items()
        if values[language] < sign * floor
    }
    objective = macro - settings.gap_weight * (macro - worst) - sum(lacks.values())
    return Score(objective, sign * macro, sign * worst, worst_language, tuple(sorted(lacks)))


def languages(manifest: Manifest, settings: Sweep) -> dict[str, int]:
    """The languages that are judged, each with its held-out rows: all that have some.

    Raises:
        ConfigError: one has too few to be judged by, or a floor names one that is not judged.
    """
    counts: dict[str, int] = {}
    for document in manifest.held_out:
        counts[document.language] = counts.get(document.language, 0) + 1
    absent = sorted(set(manifest.languages) - counts.keys())
    few = sorted(name for name, count in counts.items() if count < settings.min_rows) + absent
    if few:
        raise ConfigError(
            f"{few[0]} has {counts.get(few[0], 0)} held-out rows and sweep.min_rows asks for {settings.min_rows}; "
            "raise corpus.validation_rows, or lower the minimum"
        )
    unknown = sorted(settings.floors.keys() - counts.keys())
    if unknown:
        raise ConfigError(
            f"sweep.floors names {unknown[0]}, which is not evaluated; there are held-out rows of "
            f"{', '.join(sorted(counts))}"
        )
    return dict(sorted(counts.items()))
