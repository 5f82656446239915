"""One rule for every record: clean text, or a reason why it is none."""

from __future__ import annotations

import re
import unicodedata

SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half of a pair, which no UTF-8 file can hold."""
CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\ufeff]")
"""What is taken out of every text."""


class BadRecord(Exception):
    """A record that cannot be used; the message is the reason, without any of its text."""


def decode(raw: bytes) -> str:
    """Bytes of a file as text.

    Raises:
        BadRecord: the bytes are no UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"invalid UTF-8 at byte {error.start}") from None


def clean(value: object, max_chars: int) -> str:
    """Text in Unicode form C without control characters and outer white space.

    Raises:
        BadRecord: null, not text, empty, a NUL character, a lone surrogate, or longer than `max_chars`.
    """
    if isinstance(value, bytes):
        value = decode(value)
    if not isinstance(value, str):
        raise BadRecord("null" if value is None else f"not text but {type(value).__name__}")
    text = value.strip()
    if len(text) > max_chars:
        raise BadRecord(f"longer than {max_chars} characters")
    if not text.isprintable():
        text = _without_control(text)
    if not text:
        raise BadRecord("empty")
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _without_control(text: str) -> str:
    if "\x00" in text:
        raise BadRecord("NUL character")
    if SURROGATE.search(text):
        raise BadRecord("lone surrogate")
    return CONTROL.sub("", text).strip()


def is_unseen(text: str) -> bool:
    """Whether nothing of a text is to be seen: it is empty, or white space and signs such as a zero-width space."""
    return all(unicodedata.category(letter)[0] in "ZC" for letter in text)


class _Folding(dict[int, int | None]):
    """For `str.translate`: drops punctuation, white space and control characters, and keeps all else."""

    def __missing__(self, code: int) -> int | None:
        dropped = unicodedata.category(chr(code))[0] in "PZC"
        self[code] = None if dropped else code
        return self[code]


_FOLDING = _Folding()


def fold(text: str) -> str:
    """The letters, digits and symbols of a text in one case and one spelling (NFKC); of mere punctuation the text."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return text.translate(_FOLDING) or text.strip()
