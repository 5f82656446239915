"""Finds what belongs to a text: the other half of each pair of a test set, in both directions and in a mixed pool.

Shape letters: Q queries, C candidates, H width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlray import languages
from mlray.corpus.testsets import Case
from mlray.evaluation import labels, ranking
from mlray.evaluation.report import Figure
from mlray.objectives import contrastive
from mlray.objectives.embedding import TextEmbedder

BIAS = "language bias"
_SLICE = 4096
"""Queries that are looked up between two movements of the bar."""
_BLOCK_BYTES = 64 << 20
"""Of the products of queries with the whole pool that are held at once."""


def both_ways(rows: dict[str, list[Case]]) -> dict[str, list[Case]]:
    """The pairs of each direction, and turned round: `de-en` also gives `en-de`; `de` gives itself."""
    found: dict[str, list[Case]] = {}
    for name, group in rows.items():
        source, target = languages.halves(name)
        found.setdefault(name, []).extend(group)
        if source != target:
            turned = [case._replace(text=case.pair, pair=case.text) for case in group]
            found.setdefault(f"{target}-{source}", []).extend(turned)
    return found


class Finder:
    """Looks for texts by their vectors, each of which is made once."""

    def __init__(self, embedder: TextEmbedder, rows: dict[str, list[Case]]) -> None:
        """Embeds every text of all directions."""
        self._rows = rows
        texts = list(dict.fromkeys(text for group in rows.values() for case in group for text in case[:2]))
        self._place = {text: place for place, text in enumerate(texts)}
        self._vectors = embedder.embed(texts)

    def find(self, name: str) -> Iterator[list[str]]:
        """Of each query of a direction the numbers of the nearest candidates, the nearest first, in parts."""
        group, pool = self._rows[name], candidates(self._rows[name])
        pool_CH = self._of(list(pool))
        for first in range(0, len(group), _SLICE):
            part = [case.text for case in group[first : first + _SLICE]]
            numbers, _ = ranking.top_k(self._of(part), pool_CH, ranking.DEPTH)
            yield [" ".join(map(str, row)) for row in numbers]

    def mixed(self, resamples: int) -> dict[str, dict[str, Figure]]:
        """One pool of the texts of all languages: what does a query's own language do to the order?

        Candidates of a query are all texts of the test sets but those of the same item (its translations into other
        languages). `own above` is the share of all candidates in the query's language that lie above the right one,
        `others above` that of the candidates in other languages, and `language bias` the difference, in points: a model
        without bias has 0. One that is as near as the right one lies half above it, and takes the first place from it.

        Returns:
            Language of the query -> R@1 and these; only of pairs in two languages.
        """
        pool = _Pool.of(self._rows)
        pool_CH = self._of(pool.texts)
        columns: dict[str, list[np.ndarray]] = {}
        block = max(_BLOCK_BYTES // (4 * max(len(pool.texts), 1)), 1)
        for name, group in self._rows.items():
            language, other = languages.halves(name)
            if language == other:
                continue  # what is right is then of the query's own language
            for first in range(0, len(group), block):
                part = group[first : first + block]
                scores_QC = self._of([case.text for case in part]) @ pool_CH.T
                columns.setdefault(language, []).append(pool.above(part, scores_QC, language))
        names = ("R@1", "own above", "others above", BIAS)
        return {
            language: labels.shares(dict(zip(names, np.concatenate(values).T, strict=True)), resamples)
            for language, values in sorted(columns.items())
        }

    def _of(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors[[self._place[text] for text in texts]]


def candidates(group: Sequence[Case]) -> dict[str, int]:
    """The pool of a direction: the second halves, each text once, and its number."""
    return {text: number for number, text in enumerate(dict.fromkeys(case.pair for case in group))}


def truths(group: Sequence[Case]) -> list[str]:
    """Of each query the numbers of the right candidates: a text that stands in several pairs has several."""
    pool, related = candidates(group), _related(group)
    return [" ".join(str(pool[text]) for text in related[case.text]) for case in group]


def _related(group: Sequence[Case]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case in group:
        if case.pair not in found.setdefault(case.text, []):
            found[case.text].append(case.pair)
    return found


@dataclass(frozen=True)
class _Pool:
    """Every text of the test sets once."""

    texts: list[str]
    place: dict[str, int]
    spoken_C: np.ndarray
    """Language (that of a text's first pair)."""
    items_C: np.ndarray
    """Number of the item that a text means: pairs that share a text, or what they are about, are of one."""

    @classmethod
    def of(cls, rows: dict[str, list[Case]]) -> _Pool:
        spoken: dict[str, str] = {}
        for name, group in rows.items():
            source, target = languages.halves(name)
            for case in group:
                spoken.setdefault(case.text, source)
                spoken.setdefault(case.pair, target)
        place = {text: number for number, text in enumerate(spoken)}
        ends = np.array([[place[case.text], place[case.pair]] for group in rows.values() for case in group])
        about = np.array([case.item for group in rows.values() for case in group])
        items = contrastive.with_items(ends, about, len(spoken))
        return cls(list(spoken), place, np.array(list(spoken.values())), items)

    def above(self, part: Sequence[Case], scores_QC: np.ndarray, language: str) -> np.ndarray:
        """Of each query (Q, 4): is the right one first, and the shares of `own`, of others above it, and between."""
        query_Q = np.array([self.place[case.text] for case in part])
        right_Q = np.array([self.place[case.pair] for case in part])
        other_QC = self.items_C[query_Q][:, None] != self.items_C[None]
        right_Q1 = np.take_along_axis(scores_QC, right_Q[:, None], axis=1)
        above_QC, beside_QC = (scores_QC >= right_Q1) & other_QC, (scores_QC == right_Q1) & other_QC
        own_C = self.spoken_C == language
        shares = [
            ((above_QC & side_C).sum(axis=1) - 0.5 * (beside_QC & side_C).sum(axis=1))
            / np.maximum((other_QC & side_C).sum(axis=1), 1)
            for side_C in (own_C, ~own_C)
        ]
        return np.stack([~above_QC.any(axis=1), *shares, shares[0] - shares[1]], axis=1)
