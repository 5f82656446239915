"""The stream on Ray Data: same rows for any number of ranks, from any position, whatever the block layout."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pytest

from mlray.config import Corpus, Source, Storage
from mlray.corpus import packing, scan, sources, stream
from mlray.corpus.mixture import Mixture
from mlray.corpus.windows import WindowReader
from mlray.schema import PackedBatch, Position
from tests.cluster import corpus as sample

pytestmark = pytest.mark.cluster

MICRO = 4


class Words:
    """An encoder of one token a character: enough for the order of rows, and known by hand."""

    start_id, end_id, pad_id = 1, 2, 0

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[3 + ord(character) % 97 for character in text] for text in texts]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[WindowReader, Corpus]:
    folder = tmp_path_factory.mktemp("text")
    for language in sample.LANGUAGES:
        (folder / f"{language}.txt").write_text("\n".join(sample.sentences(language)), encoding="utf-8")
    corpus = Corpus(
        sources=(Source(uri=str(folder), language="filename"),),
        window_rows=64,
        sequence_length=128,
        validation_rows=0,
    )
    files = sources.list_files(corpus.sources, Storage())
    fragments = [(i, scan.read_file(file, corpus.max_chars, 0, Storage())) for i, file in enumerate(files)]
    manifest = scan.merge(files, fragments, corpus, "test")
    mixture = Mixture(manifest, corpus.alpha, corpus.window_rows, seed=5)
    return WindowReader(manifest, mixture, corpus.max_chars, Storage()), corpus


def consume(
    parts: tuple[WindowReader, Corpus],
    ranks: int,
    steps: int,
    per_step: int,
    start: Position,
    batches_per_block: int = 1,
) -> list[list[PackedBatch]]:
    """The first `steps` global batches as `ranks` concurrent consumers see them: rank after rank, step by step."""
    reader, corpus = parts
    deal = stream.Deal(MICRO, ranks, batches_per_block)
    dataset = stream.dataset(
        reader, packing.Texts(Words(), 128), corpus, start=start, num_windows=12, deal=deal
    )
    dataset.context.execution_options = stream.execution_options()
    shards = dataset.streaming_split(ranks, equal=True)
    taken: list[list[PackedBatch]] = [[] for _ in range(ranks)]

    def work(rank: int) -> None:
        for batch in stream.batches(shards[rank], MICRO, start, rank):
            taken[rank].append(batch)
            if len(taken[rank]) == steps * per_step // ranks:
                return

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    return taken


def rows_by_step(taken: list[list[PackedBatch]], per_step: int) -> list[list[tuple[int, int]]]:
    """(window, row) of every global batch, ordered."""
    ranks = len(taken)
    each = per_step // ranks
    steps = len(taken[0]) // each
    return [
        sorted(
            (int(window), int(row))
            for rank in range(ranks)
            for batch in taken[rank][step * each : (step + 1) * each]
            for window, row in zip(batch.window_B, batch.row_B, strict=True)
        )
        for step in range(steps)
    ]


def expected(parts: tuple[WindowReader, Corpus], rows: int) -> list[tuple[int, int]]:
    """(window, row) of the first rows, packed here without Ray."""
    reader, _ = parts
    places: list[tuple[int, int]] = []
    number = 0
    while len(places) < rows:
        table = packing.pack(reader.read(number), packing.Texts(Words(), 128), 128, reader.mixture.seed)
        places += [(number, row) for row in range(len(table))]
        number += 1
    return places[:rows]


def test_one_two_and_four_ranks_see_the_same_global_batches(
    cluster: str, reader: tuple[WindowReader, Corpus]
) -> None:
    steps, per_step = 6, 4
    places = expected(reader, steps * per_step * MICRO)
    size = per_step * MICRO
    truth = [places[i * size : (i + 1) * size] for i in range(steps)]
    for ranks, batches_per_block in ((1, 5), (2, 1), (4, 3)):
        taken = consume(reader, ranks, steps, per_step, Position(), batches_per_block)
        assert [len(batches) for batches in taken] == [steps * per_step // ranks] * ranks
        assert rows_by_step(taken, per_step) == truth


def test_a_round_is_sorted_by_worker_and_blocks_are_no_larger_than_needed() -> None:
    deal = stream.Deal(micro_batch_size=2, num_workers=3, batches_per_block=2)
    assert (deal.rows_per_block, deal.rows_per_round) == (4, 12)
    table = pa.table({"row": list(range(12))})
    assert deal.sort(table).column("row").to_pylist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    corpus = Corpus(sequence_length=128)
    assert (
        stream.Deal.of(corpus, 64, 2, 10_000).batches_per_block == 32
    )  # 32 x 64 x 128 tokens of 4 bytes: a megabyte
    assert stream.Deal.of(corpus, 64, 2, 5).batches_per_block == 5
    assert stream.Deal.of(corpus, 10_000, 2, 5).batches_per_block == 1


def test_a_stream_from_a_position_goes_on_with_the_same_rows_and_tokens(
    cluster: str, reader: tuple[WindowReader, Corpus]
) -> None:
    whole = consume(reader, 1, 6, 4, Position())[0]
    start = whole[7].next_position
    assert start.row > 0  # in the middle of a window
    rest = consume(reader, 1, 4, 4, start)[0]
    for batch, again in zip(whole[8:], rest, strict=True):
        assert (batch.tokens_BT == again.tokens_BT).all()
        assert (batch.documents_D == again.documents_D).all()
        assert (batch.row_B == again.row_B).all()


def test_a_stream_that_starts_elsewhere_is_refused(cluster: str, reader: tuple[WindowReader, Corpus]) -> None:
    from mlray.config import RunError

    parts, corpus = reader
    dataset = stream.dataset(
        parts,
        packing.Texts(Words(), 128),
        corpus,
        start=Position(0, 3),
        num_windows=1,
        deal=stream.Deal(MICRO),
    )
    with pytest.raises(RunError, match="starts at row 3 of window 0 instead of 5"):
        next(stream.batches(dataset.iterator(), MICRO, Position(0, 5), 0))


def test_scan_equals_a_scan_without_ray(cluster: str, tmp_path: Path) -> None:
    for language in ("de", "ja"):
        (tmp_path / f"{language}.txt").write_text("\n".join(sample.sentences(language)), encoding="utf-8")
    corpus = Corpus(sources=(Source(uri=str(tmp_path)),), validation_rows=5)
    files = sources.list_files(corpus.sources, Storage())
    alone = scan.merge(
        files,
        [(i, scan.read_file(f, corpus.max_chars, 5, Storage())) for i, f in enumerate(files)],
        corpus,
        "x",
    )
    assert stream.build_manifest(files, corpus, Storage(), "x") == alone
