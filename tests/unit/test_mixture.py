"""The order of documents: exact shares, every document once an epoch, a function of the seed alone."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlray.corpus import mixture as mixtures
from mlray.corpus.lines import Chunk
from mlray.corpus.manifest import ChunkEntry, Manifest, Part
from mlray.corpus.mixture import Mixture, Slice
from mlray.corpus.sources import SourceFile


def manifest_of(chunks: list[dict[str, int]]) -> Manifest:
    """A manifest whose chunks hold so many training documents of each language; no file is behind it."""
    entries = []
    for number, sizes in enumerate(chunks):
        file = SourceFile(f"{number}.jsonl", 0, "", "jsonl", None, ("text",), None, None, "language")
        parts = tuple(Part(language, size, 0, ()) for language, size in sizes.items())
        entries.append(ChunkEntry(Chunk(file), parts))
    return Manifest(tuple(entries), (), (), "")


def ids(slices: list[Slice]) -> list[tuple[int, int, int]]:
    """(language, chunk, place in the chunk) of every document of a window."""
    return [(part.language, part.chunk, part.first + i) for part in slices for i in range(part.count)]


def sequence(mixture: Mixture, windows: int) -> list[tuple[int, int, int]]:
    return [document for number in range(windows) for document in ids(mixture.window(number))]


def test_shares_by_hand() -> None:
    assert mixtures.shares(np.array([1, 3]), 1.0).tolist() == [0.25, 0.75]
    assert mixtures.shares(np.array([1, 3]), 0.0).tolist() == [0.5, 0.5]
    assert mixtures.shares(np.array([16, 81]), 0.5).tolist() == pytest.approx([4 / 13, 9 / 13])


def test_temperature_gives_the_shares_of_the_formula() -> None:
    counts = {"de": 10**5, "fr": 10**4, "sw": 10**2}
    mixture = Mixture(manifest_of([counts]), 0.3, 1000, 3)
    seen = Counter(language for language, _, _ in sequence(mixture, 100))
    weights = [10**1.5, 10**1.2, 10**0.6]  # n^0.3
    assert sum(seen.values()) == 10**5
    assert [seen[language] for language in range(3)] == pytest.approx(
        [10**5 * weight / sum(weights) for weight in weights], rel=0.01
    )


proportions_and_offsets = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 10**6), min_size=n, max_size=n),
        st.lists(st.floats(0, 1, exclude_max=True), min_size=n, max_size=n),
    )
)


@given(drawn=proportions_and_offsets, rows=st.integers(0, 10**7), more=st.integers(0, 50))
def test_cumulative_sums_to_rows_and_never_falls(
    drawn: tuple[list[int], list[float]], rows: int, more: int
) -> None:
    proportions = mixtures.shares(np.array(drawn[0]), 1.0)
    offsets = np.array(drawn[1])
    before = mixtures.cumulative(proportions, offsets, rows)
    after = mixtures.cumulative(proportions, offsets, rows + more)
    assert int(before.sum()) == rows
    assert int(after.sum()) == rows + more
    assert (after >= before).all()


def test_cumulative_is_the_stride_schedule() -> None:
    """Against the definition: document j of language l comes at (j + 1 - offset_l) / p_l."""
    proportions, offsets = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.7, 0.4])
    times = [((j + 1 - offsets[i]) / proportions[i], i) for i in range(3) for j in range(200)]
    order = [i for _, i in sorted(times)]
    for rows in range(120):
        expected = [order[:rows].count(i) for i in range(3)]
        assert mixtures.cumulative(proportions, offsets, rows).tolist() == expected


def test_windows_are_full_and_follow_each_other() -> None:
    mixture = Mixture(manifest_of([{"de": 50, "fr": 7}, {"fr": 30}, {"ja": 1}]), 0.5, 16, 1)
    seen = np.zeros(3, dtype=int)
    for number in range(40):
        documents = ids(mixture.window(number))
        assert len(documents) == 16
        seen += [sum(language == i for language, _, _ in documents) for i in range(3)]
        assert mixture.seen(number + 1).tolist() == seen.tolist()


CHUNKS = [{"de": 7, "fr": 3}, {"de": 1}, {"fr": 5, "ja": 2}, {"de": 12}]
DOCUMENTS = {
    0: {(0, chunk, i) for chunk, size in ((0, 7), (1, 1), (3, 12)) for i in range(size)},
    1: {(1, chunk, i) for chunk, size in ((0, 3), (2, 5)) for i in range(size)},
    2: {(2, 2, 0), (2, 2, 1)},
}


@given(alpha=st.floats(0, 1), window_rows=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_every_document_of_a_language_comes_once_an_epoch(alpha: float, window_rows: int, seed: int) -> None:
    mixture = Mixture(manifest_of(CHUNKS), alpha, window_rows, seed)
    documents = sequence(mixture, -(-200 // window_rows))
    for language, expected in DOCUMENTS.items():
        own = [document for document in documents if document[0] == language]
        size = len(expected)
        epochs = [own[start : start + size] for start in range(0, len(own), size)]
        assert epochs
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= expected


def test_chunks_come_in_another_order_each_epoch() -> None:
    mixture = Mixture(manifest_of([{"de": 4}] * 8), 1.0, 32, 5)
    orders = [[part.chunk for part in mixture.window(number)] for number in range(4)]
    assert [sorted(order) for order in orders] == [list(range(8))] * 4
    assert len({tuple(order) for order in orders}) == 4


def test_same_seed_gives_the_same_documents_and_another_seed_others() -> None:
    manifest = manifest_of([{"de": 30, "fr": 20}] * 6)
    first, again, other = (sequence(Mixture(manifest, 0.3, 16, seed), 12) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_any_window_can_be_computed_alone() -> None:
    manifest = manifest_of(CHUNKS)
    in_order = Mixture(manifest, 0.3, 16, 1)
    windows = [in_order.window(number) for number in range(30)]
    assert [Mixture(manifest, 0.3, 16, 1).window(number) for number in range(30)] == windows
    backwards = Mixture(manifest, 0.3, 16, 1)
    assert [backwards.window(number) for number in reversed(range(30))] == windows[::-1]


def test_languages_and_counts() -> None:
    mixture = Mixture(manifest_of([{"fr": 10, "de": 30}, {"ja": 0}]), 1.0, 20, 0)
    assert mixture.languages == ["de", "fr"]
    assert mixture.counts.tolist() == [30, 10]


def test_tasks_are_mixed_by_their_own_temperature() -> None:
    names = ["intent:de", "ner:de", "ner:ru"]
    counts = np.array([400, 100, 900])  # 400 to 1,000 rows: square roots 20 and 31.62
    found = mixtures.task_shares(names, counts, 1.0, 0.5)
    between = 20 / (20 + 1000**0.5)
    assert found.tolist() == pytest.approx([between, (1 - between) * 0.1, (1 - between) * 0.9])
    assert mixtures.task_shares(names, counts, 0.0, 0.0).tolist() == [0.5, 0.25, 0.25]
    plain = ["de", "ru"]
    assert (
        mixtures.task_shares(plain, counts[:2], 0.3, 0.9).tolist()
        == mixtures.shares(counts[:2], 0.3).tolist()
    )
