"""The arms of `search.py`, each a process: `search_arms.py FOLDER ARM`.

It builds, changes and deletes products, settles on a setting, and prints a line of JSON; then one after each round
that a line on its input asks for. An arm is a class with `build`, `search(market, queries) -> row numbers`, and where
the index can do it `change` and `delete`; `settings` are tried in turn, the cheapest first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NEAREST, RECALL, BATCH, CHANGED = 10, 0.95, 64, 1000
BREADTHS = (16, 32, 48, 64, 96, 128, 192, 256, 512)


class Ours:
    """`mlray.release.index`."""

    settings: Sequence[Any] = BREADTHS

    def build(self, pool: np.ndarray, markets: np.ndarray) -> None:
        from mlray.release.index import ProductIndex

        self._index = ProductIndex(pool.shape[1])
        for market in np.unique(markets):
            own = np.flatnonzero(markets == market)
            self._index.upsert(str(market), [str(i) for i in own], pool[own])

    def set(self, setting: Any) -> None:
        for market in self._index._markets.values():
            market.index.expansion_search = setting

    def search(self, market: int, queries: np.ndarray) -> list[list[int]]:
        return [[int(name) for name, _ in row] for row in self._index.search(str(market), queries, NEAREST)]

    def change(self, market: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        self._index.upsert(str(market), [str(i) for i in rows], vectors)

    def delete(self, market: int, rows: np.ndarray) -> None:
        self._index.delete(str(market), [str(i) for i in rows])

    def save(self, folder: Path) -> None:
        self._index.save(folder)


class Served(Ours):
    """The same, as it is served."""

    settings: Sequence[Any] = ("as it is served",)

    def set(self, setting: Any) -> None:
        pass


class FaissFlat:
    """faiss, every vector looked at, one index a market."""

    settings: Sequence[Any] = ("exact",)

    def _make(self, width: int) -> Any:
        import faiss

        return faiss.IndexFlatIP(width)

    def build(self, pool: np.ndarray, markets: np.ndarray) -> None:
        import faiss

        faiss.omp_set_num_threads(2)
        self._markets = {}
        for market in np.unique(markets):
            own = np.flatnonzero(markets == market)
            index = faiss.IndexIDMap2(self._make(pool.shape[1]))
            index.add_with_ids(pool[own], own)
            self._markets[int(market)] = index

    def set(self, setting: Any) -> None:
        pass

    def search(self, market: int, queries: np.ndarray) -> list[list[int]]:
        return self._markets[market].search(queries, NEAREST)[1].tolist()

    def change(self, market: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        self.delete(market, rows)
        self._markets[market].add_with_ids(vectors, rows)

    def delete(self, market: int, rows: np.ndarray) -> None:
        self._markets[market].remove_ids(rows)

    def save(self, folder: Path) -> None:
        import faiss

        for market, index in self._markets.items():
            faiss.write_index(index, str(folder / f"{market}"))


class FaissHnswMarket(FaissFlat):
    """faiss, a graph a market; it cannot take products out again."""

    settings = BREADTHS
    change = delete = None  # type: ignore[assignment]

    def _make(self, width: int) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(width, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 128
        return index

    def set(self, setting: Any) -> None:
        import faiss

        for index in self._markets.values():
            faiss.downcast_index(index.index).hnsw.efSearch = setting


class FaissHnsw:
    """faiss, one graph and a selector of each market's rows."""

    settings: Sequence[Any] = BREADTHS
    change = delete = None

    def build(self, pool: np.ndarray, markets: np.ndarray) -> None:
        import faiss

        faiss.omp_set_num_threads(2)
        self._index = faiss.IndexHNSWFlat(pool.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = 128
        self._index.add(pool)
        self._bits = {}
        for market in np.unique(markets):
            self._bits[int(market)] = np.packbits(markets == market, bitorder="little")
        self._selectors = {
            m: faiss.IDSelectorBitmap(len(pool), faiss.swig_ptr(b)) for m, b in self._bits.items()
        }

    def set(self, setting: Any) -> None:
        import faiss

        self._parameters = {
            market: faiss.SearchParametersHNSW(sel=selector, efSearch=setting)
            for market, selector in self._selectors.items()
        }

    def search(self, market: int, queries: np.ndarray) -> list[list[int]]:
        return self._index.search(queries, NEAREST, params=self._parameters[market])[1].tolist()

    def save(self, folder: Path) -> None:
        import faiss

        faiss.write_index(self._index, str(folder / "index"))


class HnswlibMarket:
    """hnswlib, a graph a market."""

    settings: Sequence[Any] = BREADTHS

    def build(self, pool: np.ndarray, markets: np.ndarray) -> None:
        import hnswlib

        self._markets = {}
        for market in np.unique(markets):
            own = np.flatnonzero(markets == market)
            index = hnswlib.Index(space="ip", dim=pool.shape[1])
            index.init_index(len(own) + CHANGED, M=16, ef_construction=128, allow_replace_deleted=True)
            index.set_num_threads(2)
            index.add_items(pool[own], own)
            self._markets[int(market)] = index

    def set(self, setting: Any) -> None:
        for index in self._markets.values():
            index.set_ef(setting)

    def search(self, market: int, queries: np.ndarray) -> list[list[int]]:
        return self._markets[market].knn_query(queries, k=NEAREST)[0].tolist()

    def change(self, market: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        self._markets[market].add_items(vectors, rows)

    def delete(self, market: int, rows: np.ndarray) -> None:
        for row in rows:
            self._markets[market].mark_deleted(row)

    def save(self, folder: Path) -> None:
        for market, index in self._markets.items():
            index.save_index(str(folder / f"{market}"))


class Usearch:
    """usearch as ours has it, in single precision, and every search by the graph."""

    settings: Sequence[Any] = BREADTHS

    def build(self, pool: np.ndarray, markets: np.ndarray) -> None:
        from usearch.index import Index

        self._markets = {}
        for market in np.unique(markets):
            own = np.flatnonzero(markets == market)
            index = Index(ndim=pool.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_add=128)
            index.add(own.astype(np.uint64), pool[own])
            self._markets[int(market)] = index

    def set(self, setting: Any) -> None:
        for index in self._markets.values():
            index.expansion_search = setting

    def search(self, market: int, queries: np.ndarray) -> list[list[int]]:
        return np.atleast_2d(self._markets[market].search(queries, NEAREST).keys).astype(np.int64).tolist()

    def change(self, market: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        self.delete(market, rows)
        self._markets[market].add(rows.astype(np.uint64), vectors)

    def delete(self, market: int, rows: np.ndarray) -> None:
        self._markets[market].remove(rows.astype(np.uint64))

    def save(self, folder: Path) -> None:
        for market, index in self._markets.items():
            index.save(str(folder / f"{market}"))


class Lance:
    """LanceDB: a table on disk with an IVF_HNSW_SQ index and a filter before the search."""

    settings: Sequence[Any] = BREADTHS

    def build(self, pool: np.ndarray, markets: np.ndarray) -> None:
        import lancedb
        import pyarrow as pa

        self._folder, self._breadth = tempfile.mkdtemp(prefix="lance-"), BREADTHS[-1]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(pool.ravel()), pool.shape[1])
        rows = pa.table({"id": np.arange(len(pool)), "market": markets, "vector": vectors})
        self._table = lancedb.connect(self._folder).create_table("products", rows)
        self._table.create_index(metric="dot", vector_column_name="vector", index_type="IVF_HNSW_SQ")
        self._table.create_scalar_index("market", index_type="BITMAP")
        self._table.create_scalar_index("id")

    def set(self, setting: Any) -> None:
        self._breadth = setting

    def search(self, market: int, queries: np.ndarray) -> list[list[int]]:
        return [
            self._table.search(query)
            .distance_type("dot")
            .where(f"market = {market}", prefilter=True)
            .ef(max(self._breadth, NEAREST))
            .nprobes(20)
            .limit(NEAREST)
            .select(["id"])
            .to_arrow()
            .column("id")
            .to_pylist()
            for query in queries
        ]

    def change(self, market: int, rows: np.ndarray, vectors: np.ndarray) -> None:
        import pyarrow as pa

        cells = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        new = pa.table({"id": rows, "market": np.full(len(rows), market), "vector": cells})
        self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(new)

    def delete(self, market: int, rows: np.ndarray) -> None:
        self._table.delete(f"market = {market} AND id IN ({', '.join(map(str, rows))})")

    def save(self, folder: Path) -> None:
        os.rename(self._folder, folder / "table")
        import lancedb

        self._table = lancedb.connect(folder / "table").open_table("products")


ARMS: dict[str, Any] = {
    "ours": Ours,
    "ours-served": Served,
    "faiss-flat": FaissFlat,
    "faiss-hnsw": FaissHnsw,
    "faiss-hnsw-market": FaissHnswMarket,
    "hnswlib-market": HnswlibMarket,
    "usearch": Usearch,
    "lancedb": Lance,
}


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    data = {key: np.load(folder / f"{key}.npy") for key in ("pool", "queries", "markets", "asked", "truth")}
    before = held_mb()
    arm = ARMS[name]()
    begin = time.perf_counter()
    arm.build(data["pool"], data["markets"])
    ready: dict[str, Any] = {"build_s": time.perf_counter() - begin, **changes(arm, data)}
    saved = folder / name
    saved.mkdir()
    arm.save(saved)
    ready["disk_mb"] = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file()) / 1e6
    for setting in arm.settings:
        arm.set(setting)
        ready |= {"setting": str(setting), "recall": recall(arm, data)}
        if ready["recall"] >= RECALL:
            break
    print(json.dumps({**ready, "held_mb": held_mb() - before}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed(arm, data)), flush=True)


def held_mb() -> float:
    """Resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def changes(arm: Any, data: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Seconds in which a thousand products of the largest market get other vectors, and are deleted."""
    rows = np.flatnonzero(data["markets"] == 0)[:CHANGED]
    if arm.change is None:
        return {"change_s": None, "delete_s": None}
    begin = time.perf_counter()
    arm.change(0, rows, -data["pool"][rows])
    change_s = time.perf_counter() - begin
    arm.change(0, rows, data["pool"][rows])
    begin = time.perf_counter()
    arm.delete(0, rows)
    delete_s = time.perf_counter() - begin
    gone = set(rows.tolist())
    for found in arm.search(0, data["pool"][rows[:50]]):
        assert not gone & set(found), "a deleted product was found"
    arm.change(0, rows, data["pool"][rows]) if not isinstance(arm, HnswlibMarket) else restore(arm, rows)
    return {"change_s": change_s, "delete_s": delete_s}


def restore(arm: HnswlibMarket, rows: np.ndarray) -> None:
    """hnswlib refuses to change what is marked as deleted."""
    for row in rows:
        arm._markets[0].unmark_deleted(row)


def recall(arm: Any, data: dict[str, np.ndarray]) -> float:
    """Share of the ten exact nearest that are found."""
    hits = 0
    for query, market, truth in zip(data["queries"], data["asked"], data["truth"], strict=True):
        hits += len(set(arm.search(int(market), query[None])[0]) & set(truth.tolist()))
    return hits / data["truth"].size


def timed(arm: Any, data: dict[str, np.ndarray]) -> dict[str, float]:
    """Every query alone, then market by market in batches."""
    waits = []
    for query, market in zip(data["queries"], data["asked"], strict=True):
        begin = time.perf_counter()
        arm.search(int(market), query[None])
        waits.append(time.perf_counter() - begin)
    begin, count = time.perf_counter(), 0
    for market in range(8):
        own = data["queries"][data["asked"] == market]
        for first in range(0, len(own), BATCH):
            arm.search(market, own[first : first + BATCH])
        count += len(own)
    p50, p99 = np.percentile(waits, [50, 99]) * 1e3
    return {"p50_ms": p50, "p99_ms": p99, "batch_per_s": count / (time.perf_counter() - begin)}


if __name__ == "__main__":
    main()
