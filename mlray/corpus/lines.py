"""The lines of a chunk: byte ranges that are cut at line ends, compressed files, over-long lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from mlray import access, storage
from mlray.config import Storage
from mlray.corpus.sources import SourceFile

_BLOCK_BYTES = 1 << 20
_COMPRESSED_BLOCK_BYTES = 1 << 10  # a truncated stream gives no part of the block it breaks in
_BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class Chunk:
    """What is opened at once: from byte `start` to before `stop`; in parquet row group `start` of `stop` rows."""

    file: SourceFile
    start: int = 0
    stop: int = 0


class BrokenChunk(Exception):
    """The rest of a chunk cannot be read; the message is the reason."""


class _Line:
    """A line that comes in parts; once it is over `limit` bytes the rest of it is not kept."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        if self.size <= self._limit:
            self._parts.append(part)
            self.size += len(part)

    def take(self) -> bytes:
        content = b"".join(self._parts)[: self._limit + 1]
        self._parts, self.size = [], 0
        return content


def split(chunk: Chunk, limit: int, settings: Storage) -> Iterator[bytes | BrokenChunk]:
    """Lines that start inside the chunk; of a line over `limit` bytes only its beginning is held."""
    stop = None if chunk.file.codec else chunk.stop
    skip = chunk.start > 0  # the end of a line that belongs to the chunk before, perhaps only its line break
    position = line_start = max(chunk.start - 1, 0)
    line = _Line(limit)
    for block in _blocks(chunk, position, settings):
        if isinstance(block, BrokenChunk):
            yield block
            return
        *complete, rest = block.split(b"\n")
        for part in complete:
            if stop is not None and line_start >= stop:
                return
            line.add(part)
            content = line.take()
            if not skip:
                yield content
            skip = False
            position += len(part) + 1
            line_start = position
        position += len(rest)
        line.add(rest)
        if stop is not None and position >= stop and (skip or line.size > limit):
            break  # the next line starts after the chunk
    if line.size and not skip and (stop is None or line_start < stop):
        yield line.take()


def _blocks(chunk: Chunk, position: int, settings: Storage) -> Iterator[bytes | BrokenChunk]:
    """The decompressed bytes of a file from `position` on; the reason where they break off."""
    file = chunk.file
    size = _COMPRESSED_BLOCK_BYTES if file.codec else _BLOCK_BYTES
    with storage.open_input(file.uri, settings) as handle:
        handle.seek(position)
        stream = handle
        if file.codec:  # which reads 64 KiB at a time: from S3 each would be a request
            stream = pa.CompressedInputStream(pa.BufferedInputStream(handle, _BUFFER_BYTES), file.codec)
        try:
            while block := stream.read(size):
                yield block
        except (OSError, pa.ArrowInvalid) as error:
            access.raise_if_transport(error, file.uri, settings)
            yield BrokenChunk(f"damaged {file.codec or 'file'}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
