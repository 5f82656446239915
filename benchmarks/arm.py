"""An arm of the input benchmark: a process of its own, so that its memory and CPU time are its alone.

An arm is a context manager function of a `Setup`. What it does before its `yield` is outside the clock; it
yields a function that opens a `Corpus` as an iterator of `Batch`, which is inside; what follows the `yield`
cleans up, again outside. `serve` is the arm's side of the pipe, `ArmProcess` the benchmark's. Needs numpy and
the standard library alone: a peer that pins other versions imports it from an environment of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """Documents that lie as parquet on the S3 server and on the local disk, and as lines of a file."""

    name: str
    uri: str
    files: list[str]
    lines: str
    megabytes: float
    """10^6 bytes of UTF-8."""
    documents: int
    languages: int
    windows: int
    """Windows of an epoch of ours, all of the same size."""
    first_window: int = 0
    """Where ours begins; the peers cannot begin in the middle."""


@dataclass(frozen=True)
class Setup:
    """What all arms are given."""

    endpoint: str
    """Address of the S3 server."""
    tokenizer: str
    """Folder of the tokenizer."""
    scratch: str
    """Folder for what an arm keeps between runs."""
    corpora: dict[str, Corpus]
    batch_rows: int
    sequence_length: int
    cores: int

    @classmethod
    def read(cls, text: str) -> Setup:
        """The setup that `to_json` wrote."""
        values = json.loads(text)
        corpora = {name: Corpus(**corpus) for name, corpus in values.pop("corpora").items()}
        return cls(**values, corpora=corpora)

    def to_json(self) -> str:
        """For the command line of an arm."""
        return json.dumps(asdict(self))


class Batch(NamedTuple):
    """What a training step would be given, as numbers."""

    rows: int
    slots: int
    """Tokens that the batch has room for."""
    tokens: int
    """Tokens that are no padding, special ones included."""
    pieces: int
    """Documents, or parts of documents that are longer than a row; each stands between two special tokens."""
    documents: Callable[[], Iterable[tuple[int | None, np.ndarray]]]
    """Name (None if it cannot have another piece) and tokens, without special ones, of each piece."""


Batches = Callable[[Corpus], Iterator[Batch]]
Arm = Callable[[Setup], contextlib.AbstractContextManager[Batches]]


def padded(ids: np.ndarray, mask: np.ndarray) -> Batch:
    """A batch whose rows are documents between two special tokens, and padding after them."""

    def documents() -> Iterator[tuple[None, np.ndarray]]:
        for row, length in zip(ids, mask.sum(axis=1), strict=True):
            yield None, row[1 : length - 1]

    return Batch(len(ids), ids.size, int(mask.sum()), len(ids), documents)


@dataclass
class Counts:
    """One pass over a corpus, or over its first batches, as the arm saw it."""

    wall_s: float = 0.0
    first_batch_s: float = 0.0
    batches: int = 0
    rows: int = 0
    slots: int = 0
    tokens: int = 0
    pieces: int = 0


class Census:
    """Which documents came, whatever their order and however long ones are cut or packed."""

    def __init__(self) -> None:
        self._names, self._lengths, self._hashes = array("q"), array("q"), array("Q")

    def add(self, name: int | None, tokens: np.ndarray) -> None:
        """Takes a document or a piece of one."""
        digest = hashlib.blake2b(np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), digest_size=8)
        self._names.append(-1 - len(self._names) if name is None else name)
        self._lengths.append(len(tokens))
        self._hashes.append(int.from_bytes(digest.digest(), "little"))

    def summary(self, room: int) -> dict[str, int]:
        """Sums that are equal for equal documents, also where some arms cut them at `room` tokens."""
        names, group = np.unique(np.asarray(self._names), return_inverse=True)
        totals = np.bincount(group, weights=np.asarray(self._lengths), minlength=len(names)).astype(np.int64)
        hashes = np.asarray(self._hashes)[(totals < room)[group]]
        return {
            "documents": len(names),
            "documents_of_room_or_more": int((totals >= room).sum()),
            "tokens": int(totals.sum()),
            "tokens_after_truncation": int(np.minimum(totals, room).sum()),
            "digest_of_shorter_documents": int(np.add.reduce(hashes, dtype=np.uint64)),
        }


def serve(arm: Arm) -> None:
    """Answers the lines that `ArmProcess` writes, until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    setup = Setup.read(sys.argv[-1])
    with contextlib.ExitStack() as prepared:
        batches: Any = None
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer: dict[str, Any] = {}
                if request["do"] == "prepare":
                    batches = prepared.enter_context(arm(setup))
                elif request["do"] == "finish":
                    prepared.close()
                else:
                    opened = functools.partial(batches, setup.corpora[request["corpus"]])
                    answer = _pass(opened, request, setup)
            except Exception:
                answer = {"error": traceback.format_exc()}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _pass(opened: Callable[[], Iterator[Batch]], request: dict[str, Any], setup: Setup) -> dict[str, Any]:
    if request["do"] == "census":
        return _take_census(opened(), setup.sequence_length - 2)
    return asdict(_count(opened, request["limit"]))


def _count(opened: Callable[[], Iterator[Batch]], limit: int | None) -> Counts:
    counts = Counts()
    begin = time.perf_counter()
    for batch in opened():
        if not counts.batches:
            counts.first_batch_s = time.perf_counter() - begin
        counts.batches += 1
        counts.rows += batch.rows
        counts.slots += batch.slots
        counts.tokens += batch.tokens
        counts.pieces += batch.pieces
        if counts.batches == limit:
            break
    counts.wall_s = time.perf_counter() - begin
    return counts


def _take_census(batches: Iterator[Batch], room: int) -> dict[str, int]:
    census = Census()
    for batch in batches:
        for name, tokens in batch.documents():
            census.add(name, tokens)
    return census.summary(room)


class ArmProcess:
    """The benchmark's handle on an arm."""

    def __init__(self, command: list[str], setup: Setup, log: Path) -> None:
        self._log = log
        Path(setup.scratch).mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [*command, setup.to_json()],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w", encoding="utf-8"),
            text=True,
        )
        self.pid = self._process.pid

    def ask(self, do: str, corpus: str = "", limit: int | None = None) -> dict[str, Any]:
        """Lets the arm do one thing and returns its answer.

        Raises:
            RuntimeError: the arm failed or died; the message is its traceback or the end of its log.
        """
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, "corpus": corpus, "limit": limit}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._log.read_text(encoding="utf-8")[-4000:]}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def __enter__(self) -> ArmProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
