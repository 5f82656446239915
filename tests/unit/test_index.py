"""Products near a query, against a brute force; upserts, deletions, and what is read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlray.config import ConfigError
from mlray.release import index as indexes
from mlray.release.index import ProductIndex

H = 24


def vectors(count: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, H)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def brute(queries: np.ndarray, pool: np.ndarray, names: list[str], k: int) -> list[list[str]]:
    order = np.argsort(-(queries.astype(np.float64) @ pool.T.astype(np.float64)), axis=1)[:, :k]
    return [[names[i] for i in row] for row in order]


def filled() -> tuple[ProductIndex, np.ndarray, np.ndarray]:
    found = ProductIndex(H)
    german, japanese = vectors(400, 1), vectors(300, 2)
    found.upsert("de", [f"p{i}" for i in range(400)], german)
    found.upsert("ja", [f"p{i}" for i in range(300)], japanese)
    return found, german, japanese


def names_of(found: list[list[tuple[str, float]]]) -> list[list[str]]:
    return [[name for name, _ in row] for row in found]


def test_the_nearest_of_a_market_are_those_of_a_brute_force() -> None:
    found, german, japanese = filled()
    queries = vectors(30, 3)
    names = [f"p{i}" for i in range(400)]
    for market, pool in (("de", german), ("ja", japanese)):
        told = found.search(market, queries, 5)
        expected = brute(queries, pool, names, 5)
        hits = sum(len(set(a) & set(b)) for a, b in zip(names_of(told), expected, strict=True))
        assert hits >= 148  # half precision may exchange what is nearly equally near
        for number, row in enumerate(told):
            for name, score in row:
                assert score == pytest.approx(float(queries[number] @ pool[int(name[1:])]), abs=2e-3)
    assert found.markets == {"de": 400, "ja": 300}
    assert len(found) == 700


def test_the_graph_of_a_large_market_finds_nearly_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexes, "_EXACT", 0)
    pool, queries = vectors(4000, 5), vectors(50, 6)
    found = ProductIndex(H)
    names = [f"p{i}" for i in range(4000)]
    found.upsert("de", names, pool)
    found.save(tmp_path)
    for one in (found, ProductIndex.load(tmp_path)):
        told = names_of(one.search("de", queries, 10))
        hits = sum(len(set(a) & set(b)) for a, b in zip(told, brute(queries, pool, names, 10), strict=True))
        assert hits / 500 >= 0.95


@pytest.mark.parametrize("exact", [0, 5000])
def test_products_come_change_and_go(monkeypatch: pytest.MonkeyPatch, exact: int) -> None:
    monkeypatch.setattr(indexes, "_EXACT", exact)
    found, german, _ = filled()
    query = vectors(1, 9)
    found.upsert("de", ["new"], query)
    assert found.search("de", query, 1)[0][0][0] == "new"
    found.upsert("de", ["new"], -query)
    assert found.search("de", query, 400)[0][0][0] != "new"
    assert found.search("de", -query, 1)[0][0][0] == "new"
    assert found.delete("de", ["new", "never", "p7"]) == 2
    assert found.delete("de", ["p7"]) == 0
    assert found.delete("us", ["p7"]) == 0
    told = found.search("de", german[7:8], 400)[0]
    assert len(told) >= 390
    assert "p7" not in [name for name, _ in told]
    assert found.markets["de"] == 399
    found.delete("ja", [f"p{i}" for i in range(300)])
    assert found.search("ja", query, 3) == [[]]


def test_what_is_saved_is_read_back_and_goes_on(tmp_path: Path) -> None:
    found, _, _ = filled()
    found.delete("de", ["p3"])
    found.upsert("de", ["p5", "p6"], vectors(2, 8), ["Kettle", "Kessel"])
    found.delete("de", ["p6"])
    found.save(tmp_path)
    again = ProductIndex.load(tmp_path)
    assert [again.title("de", name) for name in ("p5", "p6", "p7")] == ["Kettle", None, None]
    queries = vectors(10, 3)
    for market in ("de", "ja"):
        assert again.search(market, queries, 5) == found.search(market, queries, 5)
    assert (again.width, again.markets) == (H, found.markets)
    again.upsert("de", ["p3"], queries[:1])
    assert again.search("de", queries[:1], 1)[0][0][0] == "p3"
    assert again.markets["de"] == 399


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    found, _, _ = filled()
    with pytest.raises(ConfigError, match=r"\(2, 3\) vectors for 2 products of 24 dimensions"):
        found.upsert("de", ["a", "b"], np.zeros((2, 3), np.float32))
    with pytest.raises(ConfigError, match="de: the product 'a' is there twice"):
        found.upsert("de", ["a", "a"], vectors(2, 0))
    with pytest.raises(ConfigError, match="de: 1 titles for 2 products"):
        found.upsert("de", ["a", "b"], vectors(2, 0), ["A"])
    for tag in ("../de", "", "a/b", ".", "de\n"):
        with pytest.raises(ConfigError, match="is no name of a market"):
            found.upsert(tag, ["a"], vectors(1, 0))
    with pytest.raises(ConfigError, match="no market 'us'; there are de, ja"):
        found.search("us", vectors(1, 0), 3)
    assert found.markets == {"de": 400, "ja": 300}


def test_what_was_read_without_an_adapter_has_a_graph_of_its_own(tmp_path: Path) -> None:
    own, plain = vectors(40, 1), vectors(40, 2)
    names = [f"p{i}" for i in range(40)]
    found = ProductIndex(H)
    found.upsert("de", names, own, plain_NH=plain)
    found.upsert("fr", names, own)  # no adapter
    found.upsert("de", ["p3"], own[4:5], plain_NH=plain[5:6])
    found.delete("de", ["p4", "p5"])
    found.save(tmp_path)
    for one in (found, ProductIndex.load(tmp_path)):
        assert names_of(one.search("de", own[[4, 7]], 1)) == [["p3"], ["p7"]]
        assert names_of(one.search("de", plain[[5, 7]], 1, plain=True)) == [["p3"], ["p7"]]
        assert names_of(one.search("fr", own[[7]], 1, plain=True)) == [["p7"]]
        assert one.markets == {"de": 38, "fr": 40}
    # A market that began without it has it of none of its products.
    found.upsert("fr", ["new"], own[:1], plain_NH=plain[:1])
    assert names_of(found.search("fr", own[[7]], 1, plain=True)) == [["p7"]]
