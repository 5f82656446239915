"""What a translation must not touch: order numbers, prices, sizes, addresses, names, and the words of a glossary.

Each is hidden behind a small number, which a translator copies, and put back afterwards: a name as it was, a word of
the glossary as its translation. A translation in which a number is lost, doubled or new is not used: what lies between
the protected parts is translated by itself then, so that they are there in any case, in their order.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Every repetition that may fail late is bounded: the time is linear in the length of whatever a customer writes.
_URL = r"https?://\S*[^\s.,;:!?)\]]"
_MAIL = r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{0,64}\w"
_BEFORE = r"(?:[A-Za-z]{1,20}(?:[-_/.][A-Za-z]{1,20}){0,3}[-_/.]?)?"
_AFTER = r"[A-Za-z\d]*(?:[-_/.][A-Za-z\d]+|(?<=\d)[:,×](?=\d)[A-Za-z\d]+)*"
_NUMBERED = rf"[#№]?(?<![A-Za-z\d]){_BEFORE}\d{_AFTER}"
"""Whatever holds a digit: numbers, sizes, dates, article numbers such as AB-1234."""
_CURRENCY = (
    r"(?-i:[$€£¥₹₽]|(?<!\w)(?:USD|EUR|GBP|JPY|CHF|PLN|CZK|SEK|NOK|DKK|CNY|RUB|INR|MXN|CAD|AUD|BRL)(?!\w))"
)
_UNIT = r"(?-i:%|°[CF]|(?:kg|g|mg|ml|l|cm|mm|m|km|W|kW|V|Hz|GB|TB|MB|mAh)(?!\w))"
_AMOUNT = rf"(?:{_CURRENCY}\s?)?{_NUMBERED}(?:\s?(?:{_CURRENCY}|{_UNIT}))?"
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Protected:
    """A text apart: what is translated, and what stands in the translation in any case."""

    parts: tuple[str, ...]
    """Free and kept parts in turn; the first and the last are free, and may be empty."""
    kept: tuple[str, ...]
    """What is put in the place of each kept part."""

    @property
    def masked(self) -> str:
        """The text with a number in the place of each kept part."""
        return "".join(
            part if place % 2 == 0 else str(1 + place // 2) for place, part in enumerate(self.parts)
        )

    @property
    def free(self) -> tuple[str, ...]:
        """What is translated, part by part."""
        return self.parts[::2]

    def restore(self, translation: str) -> str | None:
        """The translation of `masked` with everything in its place; None if a number is lost, doubled or new."""
        found = [int(one) for one in _DIGITS.findall(translation)]
        if sorted(found) != list(range(1, len(self.kept) + 1)):
            return None
        return _DIGITS.sub(lambda number: self.kept[int(number[0]) - 1], translation)

    def join(self, translations: Sequence[str]) -> str:
        """The translations of `free` with the kept parts between, white space as it was."""
        told = [_framed(part, one) for part, one in zip(self.free, translations, strict=True)]
        return told[0] + "".join(kept + part for kept, part in zip(self.kept, told[1:], strict=True))


def _framed(part: str, translation: str) -> str:
    bare = part.strip()
    if not bare:
        return part
    start = part.index(bare)
    return part[:start] + translation.strip() + part[start + len(bare) :]


class Protector:
    """Takes texts apart by one glossary."""

    def __init__(self, texts: Sequence[str], glossary: Mapping[str, str], names: Sequence[str]) -> None:
        """
        Args:
            texts: that will be taken apart; words that stand in none of them cost nothing.
            glossary: word or phrase -> what stands for it in the translation, whatever its case in the text.
            names: what stays as it is, such as brands, whatever its case.
        """
        words: dict[str, str | None] = dict.fromkeys(map(_composed, names))
        words |= {_composed(word): to for word, to in glossary.items()}
        whole = "\n".join(map(_composed, texts)).casefold()
        there = sorted((word for word in words if word.casefold() in whole), key=lambda word: -len(word))
        self._told = [words[word] for word in there]
        own = [f"({_bounded(word)})" for word in there]
        self._pattern = re.compile("|".join([*own, _URL, _MAIL, _AMOUNT]), re.IGNORECASE)

    def protect(self, text: str) -> Protected:
        """A text apart, in Unicode form C."""
        text = _composed(text)
        parts, kept, end = list[str](), list[str](), 0
        for match in self._pattern.finditer(text):
            parts += [text[end : match.start()], match[0]]
            told = self._told[match.lastindex - 1] if match.lastindex else None
            kept.append(match[0] if told is None else told)
            end = match.end()
        return Protected((*parts, text[end:]), tuple(kept))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _bounded(word: str) -> str:
    """The pattern of a word that is no part of another; in scripts without spaces every word is."""
    before, after = r"(?<!\w)" if word[:1].isascii() else "", r"(?!\w)" if word[-1:].isascii() else ""
    return f"{before}{re.escape(word)}{after}"
