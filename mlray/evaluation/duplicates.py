"""Near duplicates: texts that share most of their shingles, all of them found, without comparing each with each.

Two texts are near duplicates if their 5-letter shingles have a Jaccard similarity of at least 0.8 or, where both have
fewer than 60 letters, their 3-letter shingles one of at least 0.64; in scripts without spaces a shingle has 2 letters.
So one changed letter is found in texts from 16 letters on (11 in scripts without spaces), one changed word of five
letters from 34 on, where no shingle stands twice. Shorter texts with a change inside are told apart, such as "7 am"
and "8 am".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain

from mlray import languages

SHORT = 60
"""Letters; in fewer, one changed word breaks too many of the longer shingles."""
MEASURES = ((5, 0.8), (3, 0.64))
"""Letters of a shingle and the Jaccard similarity that it takes: of any two texts, and of two short ones."""
UNSPACED_LETTERS = 2
"""Of a shingle in scripts without spaces, where five would be a phrase."""
_SHARED = 3
"""Of the rare shingles, by a candidate; with one, fifteen times as many texts are compared."""
CRITERION = (
    f"Jaccard >= {MEASURES[0][1]} of {MEASURES[0][0]} letters, or >= {MEASURES[1][1]} of {MEASURES[1][0]} where both "
    f"texts have fewer than {SHORT} ({UNSPACED_LETTERS} in scripts without spaces)"
)


def shingles(folded: str, letters: int) -> frozenset[str]:
    """The runs of so many letters; of `UNSPACED_LETTERS` where one begins in a script without spaces."""
    sizes = [UNSPACED_LETTERS if languages.is_unspaced(letter) else letters for letter in folded]
    found = (folded[i : i + size] for i, size in enumerate(sizes) if i + size <= len(folded))
    return frozenset(found) or frozenset([folded])


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Share of the shingles of either that both have."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


class Duplicates:
    """The texts, all folded, that near duplicates are looked for among; memory follows their letters alone."""

    def __init__(self, texts: Iterable[str]) -> None:
        known = list(texts)
        self._all = _Alike(known, *MEASURES[0])
        self._short = _Alike([text for text in known if len(text) < SHORT], *MEASURES[1])

    def of(self, folded: str) -> set[str]:
        """The near duplicates of a text, itself not among them."""
        found = self._all.of(folded)
        if len(folded) < SHORT:
            found |= self._short.of(folded)
        return found - {folded}


class _Alike:
    """Texts by their shingles, searched by prefix filtering (Wang, Li & Feng 2012), which misses none.

    Two sets of m and n shingles with a Jaccard similarity of t or more share at least t * max(m, n) of them. In one
    order for all sets, the rarest shingles first, they then share s of the first m - t * m + s and n - t * n + s.
    """

    def __init__(self, texts: Iterable[str], letters: int, threshold: float) -> None:
        self._letters, self._threshold = letters, threshold
        self._shingles = {text: shingles(text, letters) for text in texts}
        self._counts = Counter(chain.from_iterable(self._shingles.values()))
        self._holders: dict[str, list[str]] = {}
        for text, own in self._shingles.items():
            for shingle in self._rarest(own):
                self._holders.setdefault(shingle, []).append(text)

    def of(self, folded: str) -> set[str]:
        own = shingles(folded, self._letters)
        holders = (self._holders.get(shingle, ()) for shingle in self._rarest(own))
        shared = Counter(chain.from_iterable(holders))
        least = min(_SHARED, max(int(self._threshold * len(own)), 1))
        return {
            text
            for text, count in shared.items()
            if count >= least and jaccard(own, self._shingles[text]) >= self._threshold
        }

    def _rarest(self, own: frozenset[str]) -> list[str]:
        ordered = sorted(own, key=lambda shingle: (self._counts[shingle], shingle))
        return ordered[: len(own) - int(self._threshold * len(own)) + _SHARED]
