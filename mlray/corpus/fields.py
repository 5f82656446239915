"""From the cells of a row to a record: text, what belongs to it, language, and the part of the source that it is in."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from mlray import languages
from mlray.corpus.cleaning import BadRecord, clean, decode
from mlray.corpus.label_maps import LabelMap
from mlray.corpus.sources import SourceFile

OUTSIDE = "in another part of the source"
_LABEL_CHARS = 60


class Record(NamedTuple):
    """One raw record: its row in the chunk and either its text or the reason why it has none."""

    row: int
    language: str
    text: str
    pair: str
    reason: str


def record(row: int, cells: list[object], file: SourceFile, max_chars: int) -> Record:
    """The record of a row whose cells are those of `columns`; `OUTSIDE` is the reason of one in another part."""
    language = file.fallback
    first, last = file.part
    try:
        key = cells.pop() if file.part_by else None
        if file.language_column:
            tag = clean(cells.pop(), 64)
            normal = languages.normalize(tag)
            if normal is None:
                raise BadRecord("no language tag in the language column")
            language = file.name(normal)
        pair = clean(_beside(cells), max_chars) if file.pair or file.pair_uri else ""
        if file.label_map:
            pair = _mapped(pair, file)
        text = clean(cells[0] if len(cells) == 1 and isinstance(cells[0], str) else _joined(cells), max_chars)
        inside = first <= share_of(text if key is None else str(key)) < last
    except BadRecord as error:
        return Record(row, language, "", "", str(error))
    return Record(row, language, text, pair, "") if inside else Record(row, language, "", "", OUTSIDE)


def share_of(key: str) -> float:
    """A place in [0, 1) by hash: the same text, or whatever else decides, is in the same part of every file."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big") / 2**48


def columns(file: SourceFile) -> list[str]:
    """The columns that a record is made of, in order."""
    return [name for name in (*file.columns, file.pair, file.language_column, file.part_by) if name]


def _mapped(label: str, file: SourceFile) -> str:
    names = _names(file.label_map)
    if label not in names:
        raise BadRecord(f"the label {label[:_LABEL_CHARS]!r} is not in the label map")
    return names[label]


@functools.lru_cache(maxsize=16)
def _names(label_map: LabelMap) -> dict[str, str]:
    return dict(label_map)


def _beside(cells: list[object]) -> object:
    """Takes what belongs to the text: a text, the number of a label, or a list of tags beside a list of words.

    Raises:
        BadRecord: words and tags are of different number.
    """
    pair = cells.pop()
    if isinstance(pair, list) and len(cells) == 1 and isinstance(cells[0], list):
        words = cells[0]
        if len(words) != len(pair):
            raise BadRecord(f"{len(words)} words and {len(pair)} tags")
        cells[0] = " ".join("".join(str(word).split()) for word in words)
        return " ".join("".join(str(tag).split()) for tag in pair)
    return str(pair).lower() if isinstance(pair, int) else pair  # a label's number, or true and false


def _joined(cells: Sequence[object]) -> object:
    """Several columns, or a list column, as one text with a line break between; anything else stays what it is."""
    parts: list[str] = []
    for cell in cells:
        if isinstance(cell, bytes):
            parts.append(decode(cell))
        elif isinstance(cell, list) and all(isinstance(part, str | bytes) for part in cell):
            parts += [part if isinstance(part, str) else decode(part) for part in cell]
        elif isinstance(cell, str):
            parts.append(cell)
        else:
            return cell
    return "\n".join(parts)
