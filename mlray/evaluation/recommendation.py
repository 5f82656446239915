"""Ranks the items of a market as the next one of each session of a test set: with drawn negatives, and all of them.

Shape letters: Q sessions, C items of a market.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlray.corpus.fields import digest_of
from mlray.corpus.sessions import items, without_query
from mlray.corpus.testsets import Case
from mlray.evaluation import labels, ranking
from mlray.evaluation.report import Figure
from mlray.objectives.recommending import NextItem

CATALOGUE = "catalogue"
"""Name of the table over the whole catalogue of each market."""
_TOP = 10
_SLICE = 512
"""Sessions whose scores are held at once."""


@dataclass
class Market:
    """The catalogue of a market: every item that its test set names, before or as the last of a session."""

    names: list[str]
    place: dict[str, int]
    shown: set[int] = field(default_factory=set)
    """Items that stand among the first ten of a session."""
    first: list[tuple[float, ...]] = field(default_factory=list)
    """Of each session the measures of its right item among all others."""

    @classmethod
    def of(cls, group: Sequence[Case]) -> Market:
        """The market of a test set."""
        names = sorted({item for case in group for item in (*items(case.text), case.pair)})
        return cls(names, {name: number for number, name in enumerate(names)})

    def candidates(self, case: Case, number: int) -> np.ndarray:
        """The right item and, after it, `number` others that are not of the session, drawn alike; 0: all others.

        They depend on the session and on the items of the market alone.
        """
        right = self.place[case.pair]
        free_C = np.ones(len(self.names), bool)
        free_C[[right, *(self.place[item] for item in items(case.text))]] = False
        others = np.flatnonzero(free_C)
        if 0 < number < len(others):
            draw = np.random.default_rng(
                digest_of(f"{case.key} {without_query(case.text)} {case.pair}") % 2**63
            )
            others = draw.choice(others, number, replace=False)
        return np.concatenate([[right], others])

    def figures(self, resamples: int) -> dict[str, Figure]:
        """Recall and nDCG among all items of the market, and the share of them that is among the first ten of any."""
        columns = dict(zip(ranking.METRICS, np.array(self.first).T, strict=True))
        found = labels.shares({name: columns[name] for name in ("R@10", "MRR", "nDCG@10")}, resamples)
        covered = 100.0 * len(self.shown) / len(self.names)
        note = f"{len(self.names)} items|first {_TOP} of all sessions"
        return {**found, "coverage@10": Figure(covered, covered, covered, len(self.names), note)}


def rank(
    model: NextItem, group: Sequence[Case], market: Market, name: str, negatives: int
) -> Iterator[list[str]]:
    """Of each session the candidates, the likeliest first, in parts; fills what `Market.figures` needs.

    An item that the model does not know is behind all others, and the right one behind its equals.
    """
    column_C = np.array([model.items.get(item, -1) for item in market.names])
    for start in range(0, len(group), _SLICE):
        part = group[start : start + _SLICE]
        scores = model.scores([case.text for case in part], [name] * len(part))
        scores_QC = np.where(column_C < 0, -np.inf, scores[:, np.maximum(column_C, 0)])
        found = []
        for case, scores_C in zip(part, scores_QC, strict=True):
            everything = _ordered(market.candidates(case, 0), scores_C)
            right = market.place[case.pair]
            market.shown.update(everything[:_TOP].tolist())
            market.first.append(ranking.measures(list(map(str, everything[: ranking.DEPTH])), {str(right)}))
            asked = _ordered(market.candidates(case, negatives), scores_C) if negatives else everything
            found.append(" ".join(market.names[place] for place in asked[: ranking.DEPTH]))
        yield found


def _ordered(places: np.ndarray, scores_C: np.ndarray) -> np.ndarray:
    """Items by falling score; the first, which is the right one, is behind its equals."""
    after = np.zeros(len(places), bool)
    after[0] = True
    ordered: np.ndarray = places[np.lexsort((places, after, -scores_C[places]))]
    return ordered
