"""Files whose records are no lines: CSV and TSV with a header, CoNLL sentences, questions, and whole documents.

    csv, tsv    RFC 4180: a quoted cell may hold separators and line breaks; with a session column a record is what
                neighbouring rows with one value there have in their text column, with a space between
    conll       a word a line, columns apart by tabs, sentences by a blank line or where the word's number falls back;
                a column is named by its number from 0, `# name = value` before a sentence by its name; CoNLL-U's lines
                of several words (1-2) and of words that are not there (1.1) are none, nor is -DOCSTART-
    squad       see `squad.py`
    file        one document, such as program code

A CoNLL column becomes its cells with a space between, so that word k of one column belongs to word k of another.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence

from mlray.config import Storage
from mlray.corpus import lines, sessions, squad
from mlray.corpus.cleaning import CONTROL, BadRecord
from mlray.corpus.lines import BrokenChunk, Chunk

FORMATS = {"csv", "tsv", "conll", "squad", "file"}
_WHOLE_BYTES = 1 << 30
_NO_WORD = re.compile(r"\d+[-.]\d+")


def rows(
    chunk: Chunk, names: Sequence[str], limit: int, settings: Storage
) -> Iterator[list[object] | BadRecord]:
    """The cells of the named columns, or why there are none, of each record of a file.

    Args:
        chunk: the whole file.
        names: columns.
        limit: bytes of the longest line, or of the document.
        settings: how storage is reached.

    Raises:
        BrokenChunk: a column is missing in the header, or the rest of the file is damaged.
        StorageError: the file cannot be reached.
    """
    if chunk.file.format in {"squad", "file"}:
        return _documents(chunk, names, limit, settings)
    texts = _texts(chunk, limit, settings)
    if chunk.file.format == "conll":
        return _sentences(texts, names)
    delimiter, session = "," if chunk.file.format == "csv" else "\t", chunk.file.session
    if session is None:
        return _table(texts, names, delimiter, limit)
    return sessions.grouped(_table(texts, [*names, session], delimiter, limit), limit)


def _documents(
    chunk: Chunk, names: Sequence[str], limit: int, settings: Storage
) -> Iterator[list[object] | BadRecord]:
    """The questions of a file, or the file."""
    found: Iterator[dict[str, object] | BadRecord]
    try:
        if chunk.file.format == "squad":
            found = squad.rows(_whole(chunk, _WHOLE_BYTES, settings))
        else:
            found = iter([{"text": _whole(chunk, limit, settings)}])
    except BadRecord as error:
        found = iter([error])
    for row in found:
        yield row if isinstance(row, BadRecord) else _checked([row[name] for name in names])


def _whole(chunk: Chunk, limit: int, settings: Storage) -> str:
    """The text of a file; no more of one that is too long is held than shows it."""
    parts: list[bytes] = []
    size = 0
    for line in lines.split(chunk, limit, settings):
        if isinstance(line, BrokenChunk):
            raise line
        parts.append(line)
        size += len(line) + 1
        if size > limit + 1:
            raise BadRecord(f"longer than {limit} bytes")
    return b"\n".join(parts).decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _texts(chunk: Chunk, limit: int, settings: Storage) -> Iterator[str]:
    """Lines with their breaks; bytes that are no UTF-8 become lone surrogates, so that only their record is bad."""
    for number, line in enumerate(lines.split(chunk, limit, settings)):
        if isinstance(line, BrokenChunk):
            raise line
        text = line.decode("utf-8", "surrogateescape")
        yield (text.removeprefix("\ufeff") if number == 0 else text) + "\n"


def _table(
    texts: Iterator[str], names: Sequence[str], delimiter: str, limit: int
) -> Iterator[list[object] | BadRecord]:
    csv.field_size_limit(max(csv.field_size_limit(), 2 * limit))
    reader = csv.reader(texts, delimiter=delimiter)
    header = [cell.strip() for cell in next(reader, [])]
    missing = [name for name in names if name not in header]
    if missing:
        raise BrokenChunk(f"no column {missing[0]!r}; the file has {', '.join(header) or 'none'}")
    places = [header.index(name) for name in names]
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRecord(f"no {'CSV' if delimiter == ',' else 'TSV'}: {error}")
            continue
        if len(cells) == len(header):
            yield _checked([cells[place] for place in places])
        else:
            yield BadRecord(f"{len(cells)} columns instead of {len(header)}")


def _sentences(texts: Iterator[str], names: Sequence[str]) -> Iterator[list[object] | BadRecord]:
    notes: dict[str, str] = {}
    words: list[list[str]] = []
    numbered = "0" not in names  # else the first column holds the words, of which one may be a number
    for text in itertools.chain(texts, [""]):
        line = text.rstrip("\r\n")
        cells = line.split("\t")
        restarts = numbered and bool(words) and cells[0] == words[0][0] in {"0", "1"}
        if words and (not line.strip() or restarts):
            yield _sentence(words, notes, names)
            notes, words = {}, []
        if line.startswith("# ") and len(cells) == 1:
            name, _, value = line[2:].partition("=")
            notes.setdefault(name.strip(), value.strip())
        elif line.strip() and cells[0] != "-DOCSTART-" and not (numbered and _NO_WORD.fullmatch(cells[0])):
            words.append(cells)


def _sentence(
    words: list[list[str]], notes: dict[str, str], names: Sequence[str]
) -> list[object] | BadRecord:
    cells: list[object] = []
    for name in names:
        if not name.isdigit():
            if name not in notes:
                return BadRecord(f"no line '# {name} = ...' before the sentence")
            cells.append(notes[name])
            continue
        column = int(name)
        # One that is left out, or of which cleaning leaves nothing, would move all that follow.
        if any(len(word) <= column or not CONTROL.sub("", word[column]).strip() for word in words):
            return BadRecord(f"a word without column {column}; columns are apart by tabs")
        cells.append(" ".join("".join(word[column].split()) for word in words))
    return _checked(cells)


def _checked(cells: list[object]) -> list[object] | BadRecord:
    escaped = any("\udc80" <= letter <= "\udcff" for cell in cells for letter in str(cell))
    return BadRecord("invalid UTF-8") if escaped else cells
