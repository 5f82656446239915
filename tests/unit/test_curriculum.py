"""Curriculum: stages of a window, an order that is still a pure function, and nothing lost by it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from mlray.config import Corpus
from mlray.corpus import curriculum, packing, stream
from mlray.corpus.packing import Piece
from mlray.schema import WINDOW_SCHEMA, Position
from tests.unit import tiny

LENGTH = 32


def corpus(kind: str, windows: int = 1) -> Corpus:
    return Corpus.model_validate(
        {"curriculum": kind, "curriculum_windows": windows, "sequence_length": LENGTH}
    )


def test_length_goes_from_short_to_long_in_groups_of_like_number() -> None:
    pieces = [
        Piece([1] * length, 0, length) for length in (5, 3, 9, 2, 7, 16, 11, 4, 6, 8, 10, 12, 13, 14, 15, 1)
    ]
    found = curriculum.stages(pieces, "length")
    assert [[piece.document for piece in stage] for stage in found] == [[n, n + 1] for n in range(1, 17, 2)]


def test_language_goes_from_the_one_with_most_pieces_on() -> None:
    pieces = [Piece([1], language, number) for number, language in enumerate([2, 0, 1, 1, 0, 1])]
    found = curriculum.stages(pieces, "language")
    assert [[piece.document for piece in stage] for stage in found] == [[2, 3, 5], [1, 4], [0]]


def test_few_pieces_leave_no_empty_stage() -> None:
    assert curriculum.stages([Piece([1], 0, 7)], "length") == [[Piece([1], 0, 7)]]


@pytest.mark.parametrize("kind", ["length", "language"])
def test_a_window_holds_the_same_pieces_in_the_order_of_its_stages(kind: str) -> None:
    window, cutter = tiny.window(0, 60), tiny.cutter(LENGTH)
    plain = packing.unpack(packing.pack(window, cutter, LENGTH, 0))
    staged = packing.unpack(curriculum.pack(window, cutter, corpus(kind), 0))
    assert sorted(zip(plain.documents_D, plain.lengths_D, strict=True)) == sorted(
        zip(staged.documents_D, staged.lengths_D, strict=True)
    )
    assert staged.row_B.tolist() == list(range(len(staged)))
    if kind == "length":
        thirds = np.array_split(staged.lengths_D, 3)
        assert max(thirds[0]) <= min(thirds[2])
        assert not max(np.array_split(plain.lengths_D, 3)[0]) <= min(np.array_split(plain.lengths_D, 3)[2])
    else:
        assert np.count_nonzero(np.diff(staged.languages_D)) == 1
        assert np.count_nonzero(np.diff(plain.languages_D)) > 1
    assert curriculum.pack(window, cutter, corpus(kind), 0) == curriculum.pack(
        window, cutter, corpus(kind), 0
    )


def test_later_windows_and_runs_without_one_are_packed_as_ever() -> None:
    window, cutter = tiny.window(1, 40), tiny.cutter(LENGTH)
    plain = packing.pack(window, cutter, LENGTH, 0)
    assert curriculum.pack(window, cutter, corpus("length"), 0) == plain
    assert curriculum.pack(window, cutter, corpus("none"), 0) == plain
    assert curriculum.pack(window, cutter, corpus("length", windows=2), 0) != plain


@pytest.mark.parametrize("kind", ["length", "language"])
def test_a_stream_that_starts_inside_a_window_gives_the_rows_that_were_left(kind: str) -> None:
    windows = [
        pa.table(
            {name: [vars(one).get(name, one.number)] for name in WINDOW_SCHEMA.names}, schema=WINDOW_SCHEMA
        )
        for one in (tiny.window(number, 40) for number in range(3))
    ]

    def rows(start: Position) -> pa.Table:
        pack = stream._PackWindows(tiny.cutter(LENGTH), corpus(kind, windows=2), 0, start, 0)
        return pa.concat_tables(pack(window) for window in windows[start.window :])

    whole = rows(Position())
    lengths = Counter(whole.column("window").to_pylist())
    for start in (Position(0, 1), Position(0, lengths[0] // 2), Position(1, lengths[1] - 3), Position(2, 5)):
        before = sum(lengths[number] for number in range(start.window)) + start.row
        assert rows(start) == whole.slice(before)
        first = packing.unpack(rows(start).slice(0, 1))
        assert (int(first.window_B[0]), int(first.row_B[0])) == (start.window, start.row)
