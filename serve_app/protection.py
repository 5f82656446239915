"""What a translation must not touch: order numbers, prices, sizes, addresses, placeholders, names, and a glossary.

Each is hidden behind a small number, which a translator copies, and put back afterwards: a name as it was, a word of
the glossary as its translation. A translation in which a number is lost, doubled or new is not used: what lies between
the protected parts is translated by itself then, so that they are there in any case, in their order.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlray import languages

# Every repetition that may fail late is bounded: the time is linear in the length of whatever a customer writes.
_URL = r"https?://\S*[^\s.,;:!?)\]]"
_MAIL = r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{0,64}\w"
_LETTER = "[A-Za-z\u00c0-\u052f]"
"""Of Latin, Greek and Cyrillic script; in others numbers of articles are written in Latin."""
_BEFORE = rf"(?:{_LETTER}{{1,40}}(?:[-_/.]{_LETTER}{{1,40}}){{0,3}}[-_/.]?)?"
_AFTER = rf"(?:{_LETTER}|\d)*(?:[-_/.](?:{_LETTER}|\d)+|(?<=\d)[:,×](?=\d)(?:{_LETTER}|\d)+)*"
_NUMBERED = rf"[#№]?(?<!{_LETTER})(?<!\d){_BEFORE}\d{_AFTER}"
"""Whatever holds a digit: numbers, sizes, dates, article numbers such as AB-1234."""
_CURRENCY = (
    r"(?-i:[$€£¥₹₽]|(?<!\w)(?:USD|EUR|GBP|JPY|CHF|PLN|CZK|SEK|NOK|DKK|CNY|RUB|INR|MXN|CAD|AUD|BRL)(?!\w))"
)
_UNIT = r"(?-i:%|°[CF]|(?:kg|g|mg|ml|l|cm|mm|m|km|W|kW|V|Hz|GB|TB|MB|mAh)(?!\w))"
_AMOUNT = rf"(?:{_CURRENCY}\s?)?{_NUMBERED}(?:\s?(?:{_CURRENCY}|{_UNIT}))?"
_SIZE = rf"(?-i:(?<!{_LETTER})(?<![\d_'’])(?:X{{1,4}}[SL]|[SML](?![.'’]))(?!{_LETTER}|[\d_]))"
"""Of clothes, by letters: XS to XXXXL, and a lone S, M or L; `M. Dupont` and `L'eau` are none."""
_HOLE = r"\{{1,2}[^{}\n]{1,64}\}{1,2}|%(?:\d{1,2}\$)?[sd@](?!\w)|</?[A-Za-z][^<>\n]{0,200}>"
"""What is filled in or laid out later: {name}, {{order}}, %s, <b>."""
_DIGITS = re.compile(r"\d+")
_SENTENCES = re.compile(r"((?<=[.!?؟])\s+|(?<=[。！？])|\n+)")
"""Ends of sentences."""


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

    def sentences(self) -> list[Protected | str]:
        """The sentences, and the white space between them; what is protected is in one of them as a whole."""
        found, parts, kept = list[Protected | str](), list[str](), list[str]()
        for place, part in enumerate(self.parts):
            if place % 2:
                parts.append(part)
                kept.append(self.kept[place // 2])
                continue
            for number, piece in enumerate(self._pieces(place)):
                if number % 2:
                    found += [Protected(tuple(parts), tuple(kept)), piece]
                    parts, kept = [], []
                else:
                    parts.append(piece)
        return [*found, Protected(tuple(parts), tuple(kept))]

    def _pieces(self, place: int) -> list[str]:
        """A free part, cut: text, white space, text, ...; before what is protected (`Nr. 1234`) only lines end."""
        pieces = _SENTENCES.split(self.parts[place])
        if place < len(self.parts) - 1 and len(pieces) > 1 and not pieces[-1] and "\n" not in pieces[-2]:
            pieces[-3:] = [pieces[-3] + pieces[-2]]
        return pieces

    def restore(self, translation: str) -> str | None:
        """The translation of `masked` with everything in its place; None if a number is lost, doubled or new."""
        found = [int(one) for one in _DIGITS.findall(translation)]
        if sorted(found) != list(range(1, len(self.kept) + 1)):
            return None
        framed = _framed(self.masked, translation)
        return _DIGITS.sub(lambda number: self.kept[int(number[0]) - 1], framed)

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
        self.work = len(there) * len(whole)
        """Words that are looked for, times the characters that they are looked for in."""
        self._told = [words[word] for word in there]
        self._own = [f"({_bounded(word)})" for word in there]

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join([*self._own, _HOLE, _URL, _MAIL, _AMOUNT, _SIZE]), re.IGNORECASE)

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
    before = "" if languages.is_unspaced(word[0]) else r"(?<!\w)"
    after = "" if languages.is_unspaced(word[-1]) else r"(?!\w)"
    return f"{before}{re.escape(word)}{after}"
