"""The corpus as a Ray Data stream: windows are read, packed and cut into micro-batches, always in the same
order.

Guarantees, each held by a test:
- the rows are a pure function of (manifest, configuration, seed), whatever the number of tasks or workers;
- micro-batch k goes to rank k mod world size, so 1, 2 and 4 workers see the same global batches;
- a stream that starts at a position gives the rows that an undisturbed one gives from there on.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from mlray.access import StorageError
from mlray.config import Corpus, RunError, Storage
from mlray.corpus import curriculum, packing, scan
from mlray.corpus.manifest import Manifest
from mlray.corpus.packing import Cutter
from mlray.corpus.sources import SourceFile
from mlray.corpus.windows import Window, WindowReader
from mlray.schema import WINDOW_SCHEMA, PackedBatch, Position

_BLOCK_BYTES = 1 << 20
_IDS_PER_BLOCK = 64
_CUT_CPUS = 0.05
"""CPU share of what cuts and sorts packed rows."""


def build_manifest(files: list[SourceFile], corpus: Corpus, settings: Storage, fingerprint: str) -> Manifest:
    """Builds the manifest: one Ray Data task a file.

    Raises:
        ConfigError: no usable documents.
        StorageError: a file cannot be reached.
    """
    rows = [{"number": number, "file": json.dumps(asdict(file))} for number, file in enumerate(files)]

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        file = SourceFile.of(json.loads(str(batch["file"][0])))
        try:
            fragment = scan.read_file(file, corpus.max_chars, corpus.validation_rows, settings)
        except StorageError as error:  # as data: Ray would wrap it into a traceback
            fragment = json.dumps({"fault": str(error)}).encode()
        return pa.table({"number": batch["number"], "fragment": pa.array([fragment], pa.large_binary())})

    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        read, batch_size=1, num_cpus=corpus.tokenize_cpus
    )
    fragments = ((row["number"], row["fragment"]) for row in dataset.iter_rows())
    return scan.merge(files, fragments, corpus, fingerprint)


@dataclass(frozen=True)
class Deal:
    """How micro-batches reach the workers: number k goes to worker k mod `num_workers`, many of them in a block.

    Ray Data deals whole blocks round robin, and each costs it tens of milliseconds. So the micro-batches of a round,
    `num_workers` x `batches_per_block` of them, are sorted by worker before they are cut into blocks.
    """

    micro_batch_size: int
    num_workers: int = 1
    batches_per_block: int = 1

    @classmethod
    def of(cls, corpus: Corpus, micro_batch_size: int, num_workers: int, batches_per_worker: int) -> Deal:
        """Blocks of about a megabyte of tokens, but not of more than a worker will take."""
        fitting = _BLOCK_BYTES // (4 * corpus.sequence_length * micro_batch_size)
        return cls(micro_batch_size, num_workers, max(min(fitting, batches_per_worker), 1))

    @property
    def rows_per_block(self) -> int:
        """Rows of the block of one worker."""
        return self.micro_batch_size * self.batches_per_block

    @property
    def rows_per_round(self) -> int:
        """Rows that are sorted together."""
        return self.rows_per_block * self.num_workers

    def sort(self, table: pa.Table) -> pa.Table:
        """The rows of a round, worker after worker."""
        number = np.arange(len(table)) // self.micro_batch_size
        return table.take(np.argsort(number % self.num_workers, kind="stable"))


class _ReadWindows:
    """The actor that turns window numbers into windows, one row each."""

    def __init__(self, reader: Any) -> None:
        self._reader: WindowReader = ray.get(reader)

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for number in batch["window"]:
            window = self._reader.read(int(number))
            columns = {
                "window": [window.number],
                "text": [window.text],
                "pair": [window.pair],
                "language": [window.language],
                "document": [window.document],
                "item": [window.item],
                "source": [window.source],
            }
            yield pa.table(columns, schema=WINDOW_SCHEMA)


class _PackWindows:
    """The actor that tokenises and packs; it keeps its process and its tokenizer."""

    def __init__(self, cutter: Cutter, corpus: Corpus, seed: int, start: Position, batch_rows: int) -> None:
        self._cutter, self._corpus, self._seed = cutter, corpus, seed
        self._start, self._batch_rows = start, batch_rows
        gc.freeze()  # a window is a hundred thousand small objects, and each collection would look at all imports too

    def __call__(self, table: pa.Table) -> pa.Table:
        values = table.to_pylist()[0]
        window = Window(*(values[name] for name in WINDOW_SCHEMA.names))
        packed = curriculum.pack(window, self._cutter, self._corpus, self._seed, self._batch_rows)
        return packed.slice(self._start.row) if window.number == self._start.window else packed


class _SortRounds:
    """The actor that sorts rounds by worker; a task would start a process each time, as idle ones are ended."""

    def __init__(self, deal: Deal) -> None:
        self._deal = deal

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._deal.sort(table)


def dataset(
    reader: WindowReader,
    cutter: Cutter,
    corpus: Corpus,
    *,
    start: Position,
    num_windows: int,
    deal: Deal,
    batch_rows: int = 0,
) -> ray.data.Dataset:
    """Packed rows from `start` on, over `num_windows` windows, in blocks as `deal` says.

    Batches of one language or source (`corpus.batches`) have `batch_rows`. What does not fill a round of `deal` at the
    end of the stream is in no defined order.
    """
    ids = np.arange(start.window, start.window + num_windows)
    # Ready blocks, and a share of a CPU for every stage: a read task of Ray's own would ask for a whole one, which a
    # small machine whose workers hold the rest never has.
    numbers = ray.data.from_arrow(
        [pa.table({"window": part}) for part in np.array_split(ids, -(-num_windows // _IDS_PER_BLOCK))]
    )
    context = numbers.context
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    windows = numbers.map_batches(
        _ReadWindows,
        fn_constructor_args=(ray.put(reader),),
        batch_size=1,
        num_cpus=corpus.read_cpus,
        compute=ray.data.ActorPoolStrategy(size=corpus.num_readers),
    )
    packed = windows.map_batches(
        _PackWindows,
        fn_constructor_args=(cutter, corpus, reader.mixture.seed, start, batch_rows),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=corpus.tokenize_cpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=corpus.max_tokenizers),
    )
    if deal.num_workers > 1 and deal.batches_per_block > 1:
        rounds = _cut(packed, deal.rows_per_round, corpus)
        packed = rounds.map_batches(
            _SortRounds,
            fn_constructor_args=(deal,),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=_CUT_CPUS,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
    return _cut(packed, deal.rows_per_block, corpus)


def _cut(rows: ray.data.Dataset, rows_per_block: int, corpus: Corpus) -> ray.data.Dataset:
    blocks = rows.repartition(target_num_rows_per_block=rows_per_block, strict=True)
    # `repartition` has no arguments for these: by default each of its cheap tasks asks for a whole CPU, and on a
    # small machine for a new process, which costs a hundred times what the task does.
    operator = blocks._logical_plan.dag
    operator.ray_remote_args["num_cpus"] = _CUT_CPUS
    object.__setattr__(operator, "compute", ray.data.ActorPoolStrategy(size=corpus.num_readers))
    return blocks


def least_cpus(corpus: Corpus) -> float:
    """CPUs that the stages need to run at all."""
    actors = corpus.num_readers * (corpus.read_cpus + 2 * _CUT_CPUS)
    return actors + _CUT_CPUS + corpus.tokenize_cpus


def execution_options() -> ray.data.ExecutionOptions:
    """What a consumer of `dataset` must run it with: blocks come in the order of their windows."""
    return ray.data.ExecutionOptions(preserve_order=True)


def batches(shard: Any, micro_batch_size: int, start: Position, rank: int) -> Iterator[PackedBatch]:
    """The micro-batches of one rank; an incomplete one at the end of the stream is dropped.

    Raises:
        RunError: the stream does not begin where the checkpoint ends.
    """
    tables: Iterable[pa.Table] = shard.iter_batches(
        batch_size=micro_batch_size, batch_format="pyarrow", prefetch_batches=2, drop_last=True
    )
    for number, table in enumerate(tables):
        batch = packing.unpack(table)
        if number == 0:
            _check_start(batch, start, rank, micro_batch_size)
        yield batch


def _check_start(batch: PackedBatch, start: Position, rank: int, micro_batch_size: int) -> None:
    expected = start.row + rank * micro_batch_size
    if int(batch.window_B[0]) == start.window and int(batch.row_B[0]) != expected:
        raise RunError(
            f"the stream starts at row {batch.row_B[0]} of window {start.window} instead of {expected}"
        )
