"""Adapters of single markets in a bundle: what is found there is read by them, products and queries alike.

    adapters/<tag>/    an adapter on the bundle's weights, for the market of this tag and related ones without their own

A query is read by the adapter of the market in which it looks, whatever its own language: vectors of two adapters do
not lie in one space.
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


def reader(embedder: TextEmbedder, known: Sequence[str]) -> vectors.Read:
    """Reads texts by the adapters of their markets, which are loaded."""

    def read(texts: Sequence[str], markets: Sequence[str]) -> np.ndarray:
        return embedder.embed(texts, [languages.nearest(market, known) for market in markets])

    return read
