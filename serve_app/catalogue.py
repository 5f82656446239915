"""The products of a champion: its index, and what has changed since it was built."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from mlray.access import StorageError
from mlray.config import RunError
from mlray.corpus import vectors
from mlray.release import markets
from mlray.release.changes import Change, Changes, Product
from mlray.release.index import ProductIndex

log = logging.getLogger("mlray.serve")

T = TypeVar("T")

_GROUP = 64
"""Products that are put in at a time, while searches wait."""
_SEARCHERS = ThreadPoolExecutor(2, thread_name_prefix="search")
"""Look through catalogues; nothing else may keep them busy."""


async def apart(work: Callable[..., T], *told: Any) -> T:
    """The result of a search, which an event loop does not wait for: a change may hold the catalogue."""
    return await asyncio.get_running_loop().run_in_executor(_SEARCHERS, work, *told)


class Catalogue:
    """Safe for several threads."""

    def __init__(
        self,
        index: ProductIndex,
        opened: Callable[[], vectors.Read],
        changes: Changes | None = None,
        position: int = 0,
        *,
        by_id: bool = False,
        adapters: Sequence[str] = (),
    ) -> None:
        """
        Args:
            index: as it was built.
            opened: makes the encoder that built it; called when there is a first change.
            changes: of products; None: it never changes.
            position: how many of them the index holds already; what came since is taken up by `take`.
            by_id: the encoder reads the ids of products, and not their texts.
            adapters: markets whose products it reads by an adapter, and without it beside, see `markets.both`.
        """
        self._index, self._changes = index, changes
        self._read = functools.cache(opened)
        self._taken, self._by_id, self._adapters = position, by_id, adapters
        self.version = 0
        """Grows with every change that is taken up."""
        self.markets = index.markets
        """Market -> its number of products; another one after a change."""
        self._searching, self._taking = threading.Lock(), threading.Lock()

    def search(
        self, market: str, vector_H: np.ndarray, k: int, plain: bool = False
    ) -> list[tuple[str, float, str | None]]:
        """Id, similarity and title of the k products of a market that are nearest, the nearest first.

        Args:
            market: one that is sold in.
            vector_H: of what is looked for.
            k: products, at most.
            plain: it was read without the market's adapter, if there is one.
        """
        with self._searching:
            found = self._index.search(market, vector_H[None], k, plain=plain)[0]
            return [(name, score, self._index.title(market, name)) for name, score in found]

    def like(self, market: str, names: list[str], k: int) -> list[tuple[str, float, str | None]]:
        """As `search`, of the products nearest to the mean of some that the market holds, without them."""
        with self._searching:
            names = [name for name in names if self._index.holds(market, name)]  # one may have gone meanwhile
            if not names:
                return []
            mean_H = self._index.vectors(market, names).mean(axis=0)
            unit_H = mean_H / max(float(np.linalg.norm(mean_H)), 1e-12)
            found = self._index.search(market, unit_H[None], k + len(names))[0]
            left = [(name, score) for name, score in found if name not in set(names)][:k]
            return [(name, score, self._index.title(market, name)) for name, score in left]

    def names(self, market: str) -> list[str]:
        """Ids of the products of a market."""
        with self._searching:
            return self._index.names(market)

    def titles(self, market: str, names: Sequence[str]) -> list[str | None]:
        """What people see of some products of a market."""
        with self._searching:
            return [self._index.title(market, name) for name in names]

    def missing(self, products: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of (market, id) that are not there once all is taken up that has been written.

        Raises:
            StorageError: what has been written cannot be read now.
        """
        last: dict[tuple[str, str], bool] = {}
        try:
            for change in self._changes.after(self._taken) if self._changes else ():
                last |= {(one.market, one.id): True for one in change.upsert}
                last |= dict.fromkeys(change.delete, False)
        except StorageError:
            raise
        except RunError as error:  # one is damaged: those behind it are not taken up either
            log.error("products may be there that are told as unknown: %s", error)
        gone = set(self.unknown(products))
        return [one for one in products if not last.get(one, one not in gone)]

    def unknown(self, products: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of (market, id) that are not there."""
        with self._searching:
            return [one for one in products if not self._index.holds(*one)]

    def write(self, change: Change) -> int:
        """Writes a change for all who serve these products, and returns its number; `take_up` follows.

        Raises:
            StorageError: it could not be written, and counts nowhere.
        """
        assert self._changes is not None, "an index that never changes was changed"
        return self._changes.append(change, self._taken)

    def take_up(self, number: int) -> bool:
        """As `take`; an earlier change that is damaged is left to whoever takes up the others, and tells it.

        Returns:
            Whether the change of this number is taken up.
        """
        with contextlib.suppress(RunError):
            self.take()
        return self._taken >= number

    def take(self) -> None:
        """Takes up the changes that have been written since the last time, by whomever.

        Raises:
            RunError: one cannot be read; those before it count.
        """
        if self._changes is None:
            return
        with self._taking:
            last: dict[tuple[str, str], Product | None] = {}
            taken = self._taken
            try:
                for change in self._changes.after(taken):
                    last |= {(one.market, one.id): one for one in change.upsert}
                    last |= dict.fromkeys(change.delete)
                    taken += 1
            finally:
                self._apply(last)
                self._taken = taken

    def _apply(self, last: Mapping[tuple[str, str], Product | None]) -> None:
        """Brings each product to its last state: only that is read."""
        by_market: dict[str, list[Product]] = defaultdict(list)
        for (market, name), product in last.items():
            if product is not None:
                by_market[market].append(product)
                continue
            with self._searching:
                self._index.delete(market, [name])
                self._changed()
        for market, products in by_market.items():
            for first in range(0, len(products), _GROUP):
                group, vectors_NW = self._vectors(market, products[first : first + _GROUP])
                titles = [one.text.split("\n", 1)[0] for one in group]
                if not group:
                    continue
                own_NH, plain_NH = markets.apart(vectors_NW, market, self._adapters)
                with self._searching:
                    self._index.upsert(market, [one.id for one in group], own_NH, titles, plain_NH)
                    self._changed()

    def _changed(self) -> None:
        self.version += 1
        self.markets = self._index.markets

    def _vectors(self, market: str, group: list[Product]) -> tuple[list[Product], np.ndarray]:
        """Products with their vectors; one whose text cannot be read is left out, so that no change is held up by it.

        What fails whatever the text (storage, memory) is raised, and the change is taken up at the next look.
        """
        read = self._read()
        told = [one.id if self._by_id else one.text for one in group]
        try:
            return group, read(told, [market] * len(group))
        except ValueError as error:  # such as a market that is no tag of a language
            if len(group) == 1:
                log.error("a product of a change is left out: %s", type(error).__name__)
                return [], np.empty((0, 0), np.float32)
        parts = [part for one in group if (part := self._vectors(market, [one]))[0]]
        kept = [one for products, _ in parts for one in products]
        return kept, np.concatenate([found for _, found in parts]) if parts else np.empty((0, 0), np.float32)
