"""What a translation must not touch: order numbers, prices, sizes, addresses, names, and the words of a glossary.

Each is hidden behind a small number, which a translator copies, and put back afterwards: a name as it was, a word of
the glossary as its translation. A translation in which a number is lost, doubled or new is not used: what lies between
the protected parts is translated by itself then, so that they are there in any case, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Every repetition that may fail late is bounded: the time is linear in the length of whatever a customer writes.
_PATTERNS = (
    r"https?://\S+",
    r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{0,64}\w",
    # Whatever holds a digit: numbers, sizes, dates, article numbers such as AB-1234.
    r"[#№]?(?<![A-Za-z\d])(?=[A-Za-z_./-]{0,40}\d)[A-Za-z\d]+(?:[-_/.][A-Za-z\d]+|(?<=\d)[:,×](?=\d)[A-Za-z\d]+)*",
)
_CURRENCY = (
    r"(?:[$€£¥₹₽]|(?<!\w)(?:USD|EUR|GBP|JPY|CHF|PLN|CZK|SEK|NOK|DKK|CNY|RUB|INR|MXN|CAD|AUD|BRL)(?!\w))"
)
_UNIT = r"(?:%|°[CF]|(?:kg|g|mg|ml|l|cm|mm|m|km|W|kW|V|Hz|GB|TB|MB|mAh)(?!\w))"
_NUMBER = re.compile(r"\d+")


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
        found = [int(one) for one in _NUMBER.findall(translation)]
        if sorted(found) != list(range(1, len(self.kept) + 1)):
            return None
        return _NUMBER.sub(lambda number: self.kept[int(number[0]) - 1], translation)

    def join(self, translations: Sequence[str]) -> str:
        """The translations of `free` with the kept parts between, white space as it was."""
        told = []
        for part, translation in zip(self.free, translations, strict=True):
            bare = part.strip()
            if not bare:
                told.append(part)
                continue
            before, after = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
            told.append(before + translation.strip() + after)
        return told[0] + "".join(kept + part for kept, part in zip(self.kept, told[1:], strict=True))


def protect(text: str, glossary: Mapping[str, str], names: Sequence[str]) -> Protected:
    """Takes a text apart.

    Args:
        text: of the customer.
        glossary: word or phrase -> what stands for it in the translation, whatever its case in the text.
        names: what stays as it is, such as brands, whatever its case.
    """
    words = {name.casefold(): None for name in names} | {word.casefold(): to for word, to in glossary.items()}
    folded = text.casefold()
    by_length = sorted((word for word in words if word in folded), key=lambda word: -len(word))
    own = [_whole(word) for word in by_length]
    number = rf"{_CURRENCY}?\s?{_PATTERNS[2]}\s?(?:{_CURRENCY}|{_UNIT})?"
    pattern = re.compile("|".join([*own, *_PATTERNS[:2], number]), re.IGNORECASE)
    parts, kept, end = list[str](), list[str](), 0
    for match in pattern.finditer(text):
        start, stop = _trimmed(text, *match.span())
        parts += [text[end:start], text[start:stop]]
        told = words.get(text[start:stop].casefold())
        kept.append(text[start:stop] if told is None else told)
        end = stop
    return Protected((*parts, text[end:]), tuple(kept))


def _whole(word: str) -> str:
    """The pattern of a word that is no part of another; in scripts without spaces every word is."""
    bound = r"(?<!\w)" if word[:1].isascii() else "", r"(?!\w)" if word[-1:].isascii() else ""
    return f"{bound[0]}{re.escape(word)}{bound[1]}"


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    """Without white space at either end."""
    while text[start].isspace():
        start += 1
    while text[stop - 1].isspace():
        stop -= 1
    return start, stop
