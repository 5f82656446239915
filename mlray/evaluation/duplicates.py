"""Near duplicates: texts that share most of their shingles, without comparing each with each.

Two texts are near duplicates if their 5-letter shingles have a Jaccard similarity of at least 0.8 or, where both have
fewer than 60 letters, their 3-letter shingles one of at least 0.64; in scripts without spaces a shingle has 2 letters.
So one changed letter is found in texts from 16 letters on (11 in scripts without spaces), one changed word of five
letters from 34 on, where no shingle stands twice. Shorter texts with a change inside are told apart, such as "7 am"
and "8 am".
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

from datasketch import MinHash, MinHashLSH

from mlray import languages

SHORT = 60
"""Letters; in fewer, one changed word breaks too many of the longer shingles."""
UNSPACED_LETTERS = 2
"""Of a shingle in scripts without spaces, where five would be a phrase."""


class Measure(NamedTuple):
    """When two texts are near duplicates.

    A pair at the least similarity becomes a candidate with probability 1 - (1 - jaccard^rows)^bands, 0.9999 and more.
    """

    letters: int
    """Of a shingle."""
    jaccard: float
    bands: int
    rows: int


ANY, OF_SHORT = Measure(5, 0.8, 25, 5), Measure(3, 0.64, 36, 3)
"""Of any two texts, and of two short ones."""
CRITERION = (
    f"Jaccard >= {ANY.jaccard} of {ANY.letters} letters, or >= {OF_SHORT.jaccard} of {OF_SHORT.letters} where both "
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
        self._all = _Alike(known, ANY)
        self._short = _Alike([text for text in known if len(text) < SHORT], OF_SHORT)

    def of(self, folded: str) -> set[str]:
        """The near duplicates of a text, itself not among them."""
        found = self._all.of(folded)
        if len(folded) < SHORT:
            found |= self._short.of(folded)
        return found - {folded}


class _Alike:
    """Texts by their shingles: MinHash names candidates, and the shingles themselves decide."""

    def __init__(self, texts: Iterable[str], measure: Measure) -> None:
        self._measure = measure
        self._shingles = {text: shingles(text, measure.letters) for text in texts}
        self._known = frozenset(chain.from_iterable(self._shingles.values()))
        self._empty = MinHash(measure.bands * measure.rows)
        self._lsh = MinHashLSH(num_perm=len(self._empty), params=(measure.bands, measure.rows))
        for text, own in self._shingles.items():
            self._lsh.insert(text, self._sketch(own))

    def of(self, folded: str) -> set[str]:
        own, least = shingles(folded, self._measure.letters), self._measure.jaccard
        if len(own & self._known) < least * len(own):
            return set()  # no text can have as many of them as it takes
        candidates = self._lsh.query(self._sketch(own))
        return {text for text in candidates if jaccard(own, self._shingles[text]) >= least}

    def _sketch(self, own: frozenset[str]) -> Any:
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in own])
        return sketch
