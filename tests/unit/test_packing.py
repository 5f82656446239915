"""Packing: every token once, in order, and never across a row's end."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlray.corpus import packing
from mlray.corpus.packing import Piece
from mlray.corpus.windows import Window
from mlray.schema import Position

PAD, START, END = 0, 1, 2
FIRST_TOKEN = 10


@dataclass(frozen=True)
class Numbers:
    """A tokenizer of texts that are written as their token ids."""

    start_id: int = START
    end_id: int = END
    pad_id: int = PAD

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]


def window_of(
    sizes: list[tuple[int, int | None]],
) -> tuple[Window, dict[int, tuple[list[int], list[int] | None]]]:
    """A window whose documents have so many tokens (and so many in the translation), and these tokens by id.

    No token comes twice, and tokens of a text ascend.
    """
    window = Window(7, [], [], [], [])
    expected: dict[int, tuple[list[int], list[int] | None]] = {}
    following = FIRST_TOKEN
    for number, (size, pair_size) in enumerate(sizes):
        text = list(range(following, following + size))
        following += size
        pair = None if pair_size is None else list(range(following, following + pair_size))
        following += pair_size or 0
        window.text.append(" ".join(map(str, text)))
        window.pair.append("" if pair is None else " ".join(map(str, pair)))
        window.language.append(number % 3)
        window.document.append(1000 + number)
        expected[1000 + number] = (text, pair)
    return window, expected


def items_of(table: pa.Table) -> list[tuple[int, int, list[int]]]:
    """(document, language, tokens) of everything in packed rows, by a slow loop; checks the rows' ends."""
    found = []
    for row in table.to_pylist():
        place = 0
        for length, language, document in zip(
            row["lengths"], row["languages"], row["documents"], strict=True
        ):
            found.append((document, language, row["tokens"][place : place + length]))
            place += length
        assert 0 < place <= len(row["tokens"])
        assert set(row["tokens"][place:]) <= {PAD}
    return found


def halves(tokens: list[int]) -> list[list[int]]:
    """The texts of `<start> text <end>` or `<start> text <end> translation <end>`."""
    assert tokens[0] == START
    assert tokens[-1] == END
    parts: list[list[int]] = [[]]
    for token in tokens[1:-1]:
        if token == END:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


documents = st.lists(st.tuples(st.integers(0, 60), st.none() | st.integers(1, 60)), min_size=1, max_size=25)


@given(sizes=documents, sequence_length=st.integers(8, 40), seed=st.integers(0, 5))
def test_every_token_lies_in_the_rows_once_and_in_order(
    sizes: list[tuple[int, int | None]], sequence_length: int, seed: int
) -> None:
    window, expected = window_of(sizes)
    table = packing.pack(window, packing.Texts(Numbers(), sequence_length), sequence_length, seed)
    assert table.column("row").to_pylist() == list(range(len(table)))
    assert set(table.column("window").to_pylist()) == {7}
    texts: dict[int, list[list[int]]] = {document: [] for document in expected}
    pairs: dict[int, list[list[int]]] = {document: [] for document in expected}
    for document, language, tokens in items_of(table):
        assert language == (document - 1000) % 3
        text, *other = halves(tokens)
        assert len(other) == (expected[document][1] is not None)
        texts[document].append(text)
        pairs[document] += other
    for document, (text, pair) in expected.items():  # parts of a text ascend, so sorting puts them in order
        assert [token for part in sorted(texts[document]) for token in part] == text
        assert [token for part in sorted(pairs[document]) for token in part] == (pair or [])


def test_document_and_pair_that_fit_stay_whole() -> None:
    window, _ = window_of([(6, None), (3, 2)])
    assert packing.pieces(window, Numbers(), 8) == [
        Piece([1, 10, 11, 12, 13, 14, 15, 2], 0, 1000),
        Piece([1, 16, 17, 18, 2, 19, 20, 2], 1, 1001),
    ]


def test_long_document_is_cut_into_equal_parts() -> None:
    window, _ = window_of([(13, None)])
    found = [piece.tokens for piece in packing.pieces(window, Numbers(), 8)]
    assert found == [[1, 10, 11, 12, 13, 2], [1, 14, 15, 16, 17, 2], [1, 18, 19, 20, 21, 22, 2]]


def test_long_pair_is_cut_in_both_halves_alike() -> None:
    window, _ = window_of([(6, 3)])
    found = [piece.tokens for piece in packing.pieces(window, Numbers(), 8)]
    assert found == [[1, 10, 11, 12, 2, 16, 2], [1, 13, 14, 15, 2, 17, 18, 2]]
    # Two parts of 7 and 3 tokens would hold 4 + 2, one more than the five that fit beside the special tokens.
    window, _ = window_of([(7, 3)])
    found = [piece.tokens for piece in packing.pieces(window, Numbers(), 8)]
    assert found == [[1, 10, 11, 2, 17, 2], [1, 12, 13, 2, 18, 2], [1, 14, 15, 16, 2, 19, 2]]


@pytest.mark.parametrize("pair", ["", "\u200b"])
def test_text_without_tokens_is_an_empty_document(pair: str) -> None:
    """A tokenizer may drop all of a text, such as a lone zero-width space."""

    @dataclass(frozen=True)
    class Nothing(Numbers):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            return [[] for _ in texts]

    window = Window(0, ["\u200b"], [pair], [0], [5])
    tokens = [START, END, END] if pair else [START, END]
    assert packing.pieces(window, Nothing(), 8) == [Piece(tokens, 0, 5)]


def test_best_fit_by_hand() -> None:
    # Two full rows hold 6 + 4 and 5 + 3 + 2; first come, first served would open three.
    assert packing.best_fit([3, 6, 2, 5, 4], 10) == [[1, 4], [3, 0, 2]]
    # The item of 3 goes to the row with the least room that it fits in.
    assert packing.best_fit([5, 7, 6, 3], 10) == [[1, 3], [2], [0]]
    assert packing.best_fit([], 10) == []
    assert packing.best_fit([10, 10], 10) == [[0], [1]]


def test_best_fit_refuses_an_item_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="an item of 11 tokens does not fit into a row of 10"):
        packing.best_fit([3, 11], 10)


@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_best_fit_equals_a_slow_search(lengths: list[int]) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(30 - length)
    rows = packing.best_fit(lengths, 30)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert sorted(30 - sum(lengths[item] for item in row) for row in rows) == sorted(rooms)


def packed_rows(seed: int) -> list[list[int]]:
    window, _ = window_of([(size % 17, None) for size in range(1, 80)])
    rows: list[list[int]] = (
        packing.pack(window, packing.Texts(Numbers(), 20), 20, seed).column("tokens").to_pylist()
    )
    return rows


def test_rows_are_in_an_order_of_the_seed() -> None:
    first, other = packed_rows(1), packed_rows(2)
    assert packed_rows(1) == first
    assert other != first
    assert sorted(other) == sorted(first)


@given(
    sizes=documents,
    sequence_length=st.integers(8, 40),
    cut=st.tuples(st.integers(0, 5), st.integers(1, 6)),
)
def test_unpack_equals_a_slow_loop(
    sizes: list[tuple[int, int | None]], sequence_length: int, cut: tuple[int, int]
) -> None:
    window, _ = window_of(sizes)
    whole = packing.pack(window, packing.Texts(Numbers(), sequence_length), sequence_length, 0)
    start = min(cut[0], len(whole) - 1)
    pieces = [whole.slice(start, cut[1]), whole.slice(0, 2)]
    for table in (pieces[0], pa.concat_tables(pieces)):
        batch = packing.unpack(table)
        rows = table.to_pylist()
        segments = np.zeros((len(rows), sequence_length), dtype=int)
        offsets = np.zeros((len(rows), sequence_length), dtype=int)
        flat: list[tuple[int, int, int, int]] = []
        for i, row in enumerate(rows):
            place = 0
            for number, length in enumerate(row["lengths"]):
                for offset in range(length):
                    segments[i, place], offsets[i, place] = number + 1, offset
                    place += 1
                flat.append((i, length, row["languages"][number], row["documents"][number]))
        assert len(batch) == len(rows)
        assert batch.tokens_BT.tolist() == [row["tokens"] for row in rows]
        assert batch.segments_BT.tolist() == segments.tolist()
        assert batch.offsets_BT.tolist() == offsets.tolist()
        assert batch.window_B.tolist() == [7] * len(rows)
        assert batch.row_B.tolist() == [row["row"] for row in rows]
        columns = (batch.batch_D, batch.lengths_D, batch.languages_D, batch.documents_D)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == flat
        assert batch.next_position == Position(7, rows[-1]["row"] + 1)


def test_arrays_are_small() -> None:
    window, _ = window_of([(5, None)])
    batch = packing.unpack(packing.pack(window, packing.Texts(Numbers(), 8), 8, 0))
    assert [array.dtype for array in (batch.tokens_BT, batch.segments_BT, batch.offsets_BT)] == [np.int32] * 3
