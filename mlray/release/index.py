"""Vectors of products, market by market, in which the nearest to a query are found (HNSW, Malkov and Yashunin 2018).

    products.parquet           market, key, id and title of every product
    market-<tag>.usearch       the vectors of a market by key, and their graph
    plain-<tag>.usearch        the same by the encoder without the adapter of this market, if it has one

A product is in as many markets as sell it. A search looks into one market alone, so a filter costs nothing and loses
nothing; a small market is searched exactly. Products come and go without a rebuild.
Shape letters: N products, Q queries, H width of a vector, k found products.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from usearch.index import Index, MetricKind, ScalarKind

from mlray.config import ConfigError

_PRODUCTS = "products.parquet"
_SCHEMA = pa.schema(
    [("market", pa.string()), ("key", pa.int64()), ("id", pa.string()), ("title", pa.string())]
)
_TAG = re.compile(r"[A-Za-z0-9_-]+")
_EXACT = 5000
"""Products of a market up to which every one is looked at."""
_CONNECTIVITY, _EXPANSION_ADD, _EXPANSION_SEARCH = 16, 128, 96
"""Of the graph; measured with 100,000 products in eight markets (`benchmarks/search.py`)."""


class _Market:
    """The products of one market."""

    def __init__(self, width: int) -> None:
        self.index = _empty(width)
        self.plain: Index | None = None
        """What answers when the market's adapter cannot: vectors of two adapters do not lie in one space."""
        self.keys: dict[str, int] = {}
        self.ids: dict[int, str] = {}
        self.titles: dict[str, str] = {}
        self.next = 0

    def upsert(
        self, ids: Sequence[str], vectors_NH: np.ndarray, titles: Sequence[str], plain_NH: np.ndarray | None
    ) -> None:
        if plain_NH is not None and not self.keys:  # one that began without has none of the others
            self.plain = _empty(vectors_NH.shape[1])
        self.delete(ids)
        keys_N = np.arange(self.next, self.next + len(ids), dtype=np.uint64)
        self.next += len(ids)
        self.index.add(keys_N, vectors_NH)
        if self.plain is not None:
            self.plain.add(keys_N, plain_NH)
        for name, key in zip(ids, keys_N.tolist(), strict=True):
            self.keys[name], self.ids[key] = key, name
        self.titles |= dict(zip(ids, titles, strict=False))

    def delete(self, ids: Sequence[str]) -> int:
        known = [self.keys.pop(name) for name in dict.fromkeys(ids) if name in self.keys]
        if known:
            for index in (self.index, self.plain):
                if index is not None:
                    index.remove(np.array(known, np.uint64))
        for key in known:
            self.titles.pop(self.ids.pop(key), None)
        return len(known)

    def search(self, queries_QH: np.ndarray, k: int, plain: bool) -> list[list[tuple[str, float]]]:
        if not self.keys:
            return [[] for _ in queries_QH]
        index = self.plain if plain and self.plain is not None else self.index
        found = index.search(queries_QH, min(k, len(self.keys)), exact=len(self.keys) <= _EXACT)
        keys_Qk, distances_Qk = np.atleast_2d(found.keys), np.atleast_2d(found.distances)
        counts_Q = np.atleast_1d(found.counts) if hasattr(found, "counts") else [keys_Qk.shape[1]]
        return [
            [(self.ids[key], 1.0 - distance) for key, distance in zip(keys[:n], near[:n], strict=True)]
            for keys, near, n in zip(keys_Qk.tolist(), distances_Qk.tolist(), counts_Q, strict=True)
        ]


def _empty(width: int) -> Index:
    return Index(
        ndim=width,
        metric=MetricKind.IP,
        dtype=ScalarKind.F16,
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
        expansion_search=_EXPANSION_SEARCH,
    )


def _restored(path: Path) -> Index:
    found = Index.restore(str(path))
    found.expansion_add, found.expansion_search = _EXPANSION_ADD, _EXPANSION_SEARCH
    return found


class ProductIndex:
    """Products of all markets; not safe for several threads that change it."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._markets: dict[str, _Market] = {}

    def __len__(self) -> int:
        return sum(len(market.keys) for market in self._markets.values())

    @property
    def markets(self) -> dict[str, int]:
        """Market -> its number of products."""
        return {tag: len(market.keys) for tag, market in sorted(self._markets.items()) if market.keys}

    def upsert(
        self,
        market: str,
        ids: Sequence[str],
        vectors_NH: np.ndarray,
        titles: Sequence[str] = (),
        plain_NH: np.ndarray | None = None,
    ) -> None:
        """Adds products to a market, or gives them other vectors.

        Args:
            market: a tag; an unknown one is a new market.
            ids: of the products, each once.
            vectors_NH: unit vectors.
            titles: what people see, one a product, or none at all.
            plain_NH: where an adapter has made the others, those without it: of all products of a market, or of none.

        Raises:
            ConfigError: the market is no name for a file, the vectors have another width, or an id is there twice.
        """
        if not _TAG.fullmatch(market):
            raise ConfigError(f"{market!r} is no name of a market; take letters, digits, - and _")
        if vectors_NH.shape != (len(ids), self.width):
            raise ConfigError(
                f"{vectors_NH.shape} vectors for {len(ids)} products of {self.width} dimensions"
            )
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if list(ids).count(name) > 1)
            raise ConfigError(f"{market}: the product {twice!r} is there twice")
        if titles and len(titles) != len(ids):
            raise ConfigError(f"{market}: {len(titles)} titles for {len(ids)} products")
        self._markets.setdefault(market, _Market(self.width)).upsert(ids, vectors_NH, titles, plain_NH)

    def delete(self, market: str, ids: Sequence[str]) -> int:
        """Takes products out of a market; returns how many were there."""
        return self._markets[market].delete(ids) if market in self._markets else 0

    def names(self, market: str) -> list[str]:
        """Ids of the products of a market."""
        return list(self._markets[market].keys) if market in self._markets else []

    def holds(self, market: str, name: str) -> bool:
        """Whether a market has a product."""
        return market in self._markets and name in self._markets[market].keys

    def vectors(self, market: str, names: Sequence[str]) -> np.ndarray:
        """The vectors (N, H) float32 of products that a market holds, as exactly as they are kept."""
        own = self._markets[market]
        found_NH = own.index.get(
            np.array([own.keys[name] for name in names], np.uint64), dtype=ScalarKind.F32
        )
        return np.asarray(found_NH, np.float32).reshape(len(names), self.width)

    def title(self, market: str, name: str) -> str | None:
        """What people see of a product; None if it has no title."""
        return self._markets[market].titles.get(name)

    def search(
        self, market: str, queries_QH: np.ndarray, k: int, *, plain: bool = False
    ) -> list[list[tuple[str, float]]]:
        """The k products of a market that are nearest to each query, with their similarities, the nearest first.

        Args:
            market: a tag.
            queries_QH: unit vectors.
            k: products, at most.
            plain: the queries were read without the market's adapter, if it has one.

        Raises:
            ConfigError: there is no such market.
        """
        if market not in self._markets:
            raise ConfigError(f"no market {market!r}; there are {', '.join(self.markets) or 'none'}")
        return self._markets[market].search(np.asarray(queries_QH, np.float32), k, plain)

    def save(self, folder: Path) -> None:
        """Writes all of it into a local folder."""
        rows: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}
        for tag, market in sorted(self._markets.items()):
            rows["market"] += [tag] * len(market.keys)
            rows["key"] += market.keys.values()
            rows["id"] += market.keys
            rows["title"] += [market.titles.get(name) for name in market.keys]
            market.index.save(str(folder / f"market-{tag}.usearch"))
            if market.plain is not None:
                market.plain.save(str(folder / f"plain-{tag}.usearch"))
        pq.write_table(pa.table(rows, schema=_SCHEMA), folder / _PRODUCTS)

    @classmethod
    def load(cls, folder: Path) -> ProductIndex:
        """Reads `save` back."""
        table = pq.read_table(folder / _PRODUCTS, schema=_SCHEMA)
        found: ProductIndex | None = None
        tags = np.array(table.column("market").to_pylist())
        keys = table.column("key").to_numpy()
        ids, titles = (np.array(table.column(name).to_pylist(), object) for name in ("id", "title"))
        for path in sorted(folder.glob("market-*.usearch")):
            tag = path.stem.removeprefix("market-")
            index, plain = _restored(path), folder / f"plain-{tag}.usearch"
            found = found or cls(index.ndim)
            market = found._markets[tag] = _Market(index.ndim)
            market.index, market.plain = index, _restored(plain) if plain.exists() else None
            own = tags == tag
            market.keys = dict(zip(ids[own].tolist(), keys[own].tolist(), strict=True))
            market.ids = {key: name for name, key in market.keys.items()}
            shown = zip(ids[own].tolist(), titles[own].tolist(), strict=True)
            market.titles = {name: title for name, title in shown if title is not None}
            market.next = max(market.ids, default=-1) + 1
        if found is None:
            raise ConfigError(f"{folder} holds no index of products")
        return found
