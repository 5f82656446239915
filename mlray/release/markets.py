"""Adapters of single markets in a bundle: what is found there is read by them, products and queries alike.

    adapters/<tag>/    an adapter on the bundle's weights, for the market of this tag and related ones without their own

A query is read by the adapter of the market in which it looks, whatever its own language: vectors of two adapters do
not lie in one space. So products of such a market are read without it, too, for queries that come while it is away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlray import languages
from mlray.corpus import vectors
from mlray.objectives.embedding import TextEmbedder

FOLDER = "adapters"


def tags(about: Mapping[str, Any]) -> list[str]:
    """The markets that have an adapter, by what a bundle says of itself."""
    return list(about.get("adapters", ()))


def plain(embedder: TextEmbedder) -> vectors.Read:
    """Reads texts without adapters."""
    return lambda texts, _: embedder.embed(texts)


def both(embedder: TextEmbedder, known: Sequence[str]) -> vectors.Read:
    """Reads texts by the adapters of their markets, which are loaded, and without beside: (N, 2H), see `apart`."""

    def read(texts: Sequence[str], markets: Sequence[str]) -> np.ndarray:
        names = [languages.nearest(market, known) for market in markets]
        own_NH = embedder.embed(texts, names)
        plain_NH, places = own_NH.copy(), [i for i, name in enumerate(names) if name]
        if places:
            plain_NH[places] = embedder.embed([texts[i] for i in places])
        return np.concatenate([own_NH, plain_NH], axis=1)

    return read


def apart(vectors_N2H: np.ndarray, market: str, known: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors of a market as `both` gives them: by its adapter, and without it (None: it has none)."""
    if not known:
        return vectors_N2H, None
    own_NH, plain_NH = (np.ascontiguousarray(half) for half in np.split(vectors_N2H, 2, axis=1))
    return own_NH, plain_NH if languages.nearest(market, known) else None
