"""From the cells of a row to a record: text, what belongs to it, language, and the part of the source that it is in."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from mlray import languages
from mlray.corpus import sessions
from mlray.corpus.cleaning import BadRecord, clean, decode, fold
from mlray.corpus.label_maps import LabelMap
from mlray.corpus.sources import SourceFile
from mlray.schema import SEPARATOR

OUTSIDE = "in another part of the source"
_LABEL_CHARS = 60
_LAST = 1.0 - 2.0**-48
"""The share of a row that tells no other: it belongs to the part that ends at 1."""


class Record(NamedTuple):
    """One raw record: its row in the chunk and either its text or the reason why it has none."""

    row: int
    language: str
    text: str
    pair: str
    reason: str
    key: str = ""
    """The cell of `part_by`: rows that share it belong together, such as a text and its translations."""
    item: int = 0
    """A number for the cell of `item`; 0 without one."""


def record(row: int, cells: list[object], file: SourceFile, max_chars: int) -> Record:
    """The record of a row whose cells are those of `columns`; a `BadRecord` among them is why that one is missing.

    `OUTSIDE` is the reason of one in another part, be the rest of it good or bad.
    """
    language, share = file.fallback, _LAST
    try:
        query = cells.pop() if file.query else None  # who has only looked around has none
        item = _known(cells.pop()) if file.item else None
        key = _known(cells.pop()) if file.part_by else None
        if key is not None:
            share = share_of(str(key))
        named = _named(cells.pop(), file) if file.language_column else language
        language = named if isinstance(named, str) else language
        others = cells.pop() if file.negatives else None
        halves = file.pair or file.pair_uri
        beside = cells.pop() if halves else None
        words = (
            cells[0] if len(cells) == 1 and isinstance(cells[0], list) and isinstance(beside, list) else None
        )
        if words is not None:  # tags belong to them, one to each
            cells = [_spaced(words, "word", max_chars)]
        text = clean(_joined(list(map(_items, file.columns, cells))), max_chars)
        if isinstance(query, str):
            text = sessions.with_query(text, query)
        if key is None:
            share = share_of(text)
        if not _inside(file, row, share):
            raise BadRecord(OUTSIDE)
        _known(named)
        pair = clean(_beside(_known(beside), words, max_chars), max_chars) if halves else ""
        if file.last_is_pair:
            text, pair = sessions.before_last(text)
        pair = _told(pair, text, others, file, max_chars)
    except BadRecord as error:
        return bad(row, str(error), file, share, language)
    number = 0 if item is None else digest_of(f"{file.item} {item}")
    return Record(row, language, text, pair, "", "" if key is None else str(key), number)


def bad(row: int, reason: str, file: SourceFile, share: float = _LAST, language: str = "") -> Record:
    """A record that cannot be used; one that tells nothing of its part belongs to the one that ends at 1."""
    return Record(row, language or file.fallback, "", "", reason if _inside(file, row, share) else OUTSIDE)


def _inside(file: SourceFile, row: int, share: float) -> bool:
    first, end = file.rows or (0, row + 1)
    return file.part[0] <= share < file.part[1] and first <= row < end


def share_of(key: str) -> float:
    """A place in [0, 1) by hash: the same text, or whatever else decides, is in the same part of every file."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big") / 2**48


def digest_of(text: str) -> int:
    """A number by which copies of a text are known, whatever their case, punctuation and white space."""
    folded = fold(text)
    return int.from_bytes(hashlib.blake2b(folded.encode(), digest_size=8).digest(), "big", signed=True)


def columns(file: SourceFile) -> list[str]:
    """The columns that a record is made of, in order."""
    beside = (file.pair, file.negatives, file.language_column, file.part_by, file.item, file.query)
    named = (*file.columns, *beside)
    return [name for name in named if name]


def _told(pair: str, text: str, others: object, file: SourceFile, max_chars: int) -> str:
    """What belongs to a text, by its name or its tags' names in the label map, or with the hard negatives after it."""
    if file.label_map:
        pair = _mapped(pair, file)
    if file.distinct and pair == text:
        raise BadRecord("the same text on both sides")
    if others is None:
        return pair
    return SEPARATOR.join([pair, *_negatives(_known(others), max_chars)])


def _negatives(cell: object, max_chars: int) -> list[str]:
    """The texts of a list, or of the lines of a text."""
    lines = cell.split("\n") if isinstance(cell, str) else cell
    if not isinstance(lines, list):
        raise BadRecord("the hard negatives are neither a list nor lines of a text")
    return [clean(line, max_chars) for line in lines if line != ""]


def _mapped(label: str, file: SourceFile) -> str:
    """The name of a label; of tags those of all."""
    names = _names(file.label_map)
    tags = [label] if label in names else label.split(" ")
    unknown = [tag for tag in tags if tag not in names]
    if unknown:
        odd = label if len(unknown) == len(tags) else unknown[0]
        raise BadRecord(f"the label {odd[:_LABEL_CHARS]!r} is not in the label map")
    return " ".join(names[tag] for tag in tags)


@functools.lru_cache(maxsize=16)
def _names(label_map: LabelMap) -> dict[str, str]:
    return dict(label_map)


def _known(cell: object) -> object:
    if isinstance(cell, BadRecord):
        raise cell
    return cell


def _named(cell: object, file: SourceFile) -> str | BadRecord:
    """The language that a cell names, or why it names none."""
    try:
        normal = languages.normalize(clean(_known(cell), 64))
    except BadRecord as error:
        return error
    return BadRecord("no language tag in the language column") if normal is None else file.name(normal)


def _beside(pair: object, words: list[object] | None, max_chars: int) -> object:
    """What belongs to a text: a text, the number of a label, or tags where the text is a list of words."""
    if words is not None and isinstance(pair, list):
        return _spaced(pair, "tag", max_chars)
    return str(pair).lower() if isinstance(pair, int) else pair  # a label's number, or true and false


def _spaced(parts: Sequence[object], what: str, max_chars: int) -> str:
    """Words or tags with a space between, so that each belongs to the one at its place.

    Whether there are as many tags as words is for those to see who read them.
    """
    found = []
    for place, part in enumerate(parts):
        try:
            text = clean(str(part) if isinstance(part, int) else part, max_chars)
        except BadRecord as error:  # left out, it would move all that follow
            raise BadRecord(f"{what} {place}: {error}") from None
        found.append("".join(text.split()))
    return " ".join(found)


def _items(column: str, cell: object) -> object:
    """A list of keys, such as `events.*.id`, as the items of a session."""
    if "*" in column and isinstance(cell, list):
        return [sessions.item(one) if isinstance(one, str | int) else one for one in cell]
    return cell


def _joined(cells: Sequence[object]) -> object:
    """Several columns, or a list column, as one text with a line break between; anything else stays what it is."""
    if len(cells) == 1 and isinstance(cells[0], str):
        return cells[0]
    parts: list[str] = []
    for cell in map(_known, cells):
        if isinstance(cell, bytes):
            parts.append(decode(cell))
        elif isinstance(cell, list) and all(isinstance(part, str | bytes) for part in cell):
            parts += [part if isinstance(part, str) else decode(part) for part in cell]
        elif isinstance(cell, str):
            parts.append(cell)
        else:
            return cell
    return "\n".join(parts)
