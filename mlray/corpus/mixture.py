"""The order in which documents are seen: an endless, exact, seeded sequence of windows.

Every function here is pure: the same manifest, temperature and seed give the same windows, and any window
can be computed without those before it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from mlray import languages
from mlray.config import Corpus
from mlray.corpus import manifest as manifests
from mlray.corpus.manifest import Manifest


def shares(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Probability of each language, p ~ n^alpha (Conneau and Lample 2019, section 3.1).

    Args:
        counts: documents per language, all positive.
        alpha: 1 keeps the corpus' own proportions, 0 gives every language the same share.
    """
    weights = np.asarray(counts, dtype=np.float64) ** alpha
    return np.asarray(weights / weights.sum())


def task_shares(names: list[str], counts: np.ndarray, alpha: float, task_alpha: float) -> np.ndarray:
    """The same in two steps: between tasks (`ner:de` belongs to `ner`) by `task_alpha`, inside each by `alpha`.

    Without tasks all languages belong to one.
    """
    tasks = [languages.task(name) for name in names]
    order = sorted(set(tasks))
    members = [np.array([task == one for task in tasks]) for one in order]
    between = shares(np.array([counts[own].sum() for own in members]), task_alpha)
    result = np.zeros(len(names))
    for share, own in zip(between, members, strict=True):
        result[own] = share * shares(counts[own], alpha)
    return result


def cumulative(proportions: np.ndarray, offsets: np.ndarray, rows: int) -> np.ndarray:
    """How many of the first `rows` documents each language gives (int64, sums to `rows`).

    Stride scheduling: language l gives its document j at the virtual time (j + 1 - offset_l) / p_l, and
    documents come by time. So counts never fall as `rows` grows, and their
    shares come as near to p_l as the number of languages divided by `rows`.
    """
    time = max(rows - len(proportions), 0)
    counts = np.floor(proportions * time + offsets).astype(np.int64)
    queue = [
        ((int(n) + 1 - u) / p, i)
        for i, (n, u, p) in enumerate(zip(counts, offsets, proportions, strict=True))
    ]
    heapq.heapify(queue)
    for _ in range(rows - int(counts.sum())):
        _, i = queue[0]
        counts[i] += 1
        heapq.heapreplace(queue, ((int(counts[i]) + 1 - offsets[i]) / proportions[i], i))
    return np.asarray(counts)


@dataclass(frozen=True)
class Slice:
    """`count` consecutive training documents of a language inside one chunk, from the document `first` on."""

    language: int
    chunk: int
    first: int
    count: int


class Mixture:
    """Windows over a manifest. Languages are numbered as in `manifest.languages`."""

    def __init__(
        self, manifest: Manifest, alpha: float, window_rows: int, seed: int, task_alpha: float = 0.5
    ) -> None:
        self.languages = manifest.languages
        self.window_rows = window_rows
        self.seed = seed
        self._chunks, self._sizes = zip(
            *(manifests.part_sizes(manifest, language) for language in self.languages), strict=True
        )
        self.counts = np.array([sizes.sum() for sizes in self._sizes], dtype=np.int64)
        self.proportions = task_shares(self.languages, self.counts, alpha, task_alpha)
        self._offsets = np.random.default_rng([seed, 0]).random(len(self.languages))
        self._orders: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def of(cls, manifest: Manifest, corpus: Corpus, seed: int) -> Mixture:
        """The windows of a configuration."""
        return cls(manifest, corpus.alpha, corpus.window_rows, seed, corpus.task_alpha)

    def seen(self, windows: int) -> np.ndarray:
        """Documents per language in the first `windows` windows (int64)."""
        return cumulative(self.proportions, self._offsets, windows * self.window_rows)

    def window(self, number: int) -> list[Slice]:
        """The documents of window `number`: language after language, before the shuffle inside the window."""
        first, last = self.seen(number), self.seen(number + 1)
        slices: list[Slice] = []
        for language in np.flatnonzero(last > first):
            slices += self._locate(int(language), int(first[language]), int(last[language]))
        return slices

    def _locate(self, language: int, first: int, last: int) -> list[Slice]:
        slices: list[Slice] = []
        total = int(self.counts[language])
        while first < last:
            epoch, start = divmod(first, total)
            order, ends = self._order(language, epoch)
            place = int(np.searchsorted(ends, start, side="right"))
            begin = int(ends[place] - self._sizes[language][order[place]])
            count = min(last - first, int(ends[place]) - start)
            slices.append(Slice(language, int(self._chunks[language][order[place]]), start - begin, count))
            first += count
        return slices

    def _order(self, language: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The language's chunks in the order of an epoch, and the documents up to the end of each."""
        key = (language, epoch)
        if key not in self._orders:
            order = np.random.default_rng([self.seed, 1, *key]).permutation(len(self._sizes[language]))
            self._orders.pop((language, epoch - 2), None)
            self._orders[key] = (order, np.cumsum(self._sizes[language][order]))
        return self._orders[key]
