"""What the project knows of a language tag: script, and whether words are written apart.

Tags follow BCP-47 (RFC 5646): `de`, `zh-Hant`, `pt-BR`. A translation pair has the tag `<a>-<b>` with two
two-letter codes, such as `de-en`; a region is written in capitals (`en-GB`), and in small letters only known
in `zh-cn` and its like (`es-ar` is from Spanish to Arabic).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

import langcodes
import regex
from langcodes.tag_parser import LanguageTagError

UNKNOWN = "und"
_RELATED = 25
"""CLDR's distance up to which one language is taken for another."""
_CHINESE = {"zh", "zho", "chi", "cmn"}
_BY_CHARACTER = {
    *("ja", "jpn", "th", "tha", "lo", "lao", "km", "khm", "my", "mya", "yue", "wuu", "nan", "lzh"),
    *("ko", "kor"),
}
"""Languages whose words are not written apart; and Korean, where much hangs on a word."""
_UNBROKEN = regex.compile(
    r"[\p{L}&&[\p{lb=ID}\p{lb=CJ}\p{lb=SA}\p{lb=AK}\p{lb=AS}\p{Tibetan}]]", flags=regex.VERSION1
)
"""Letters of every script in which a line may end without a space (Unicode's UAX #14), and of Tibetan."""
_REGIONAL = {
    *("zh-cn", "zh-tw", "zh-hk", "zh-sg", "zh-mo", "ja-jp", "ko-kr"),
    *("pt-br", "en-us", "en-gb", "en-au", "en-nz", "es-mx", "de-at"),
}
"""Tags that are often written small and mean no direction."""

_LANGUAGE = "[a-z]{2,3}(?:-[A-Z][a-z]{3})?(?:-[A-Z]{2})?"
_DIRECTION = re.compile(rf"({_LANGUAGE})-({_LANGUAGE})")
_TAG = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})*")


def normalize(tag: str) -> str | None:
    """The tag in BCP-47 spelling (`zh_hant` -> `zh-Hant`), or None if it is no tag."""
    tag = tag.strip()
    if not _TAG.fullmatch(tag):
        return None
    head, *rest = tag.replace("_", "-").split("-")
    parts = [head.lower()]
    for part in rest:
        if len(part) == 4 and part.isalpha():
            parts.append(part.title())
        elif len(part) == 2 and part.isalpha() and (part.isupper() or _is_region(parts, part.lower())):
            parts.append(part.upper())
        else:
            parts.append(part.lower())
    return "-".join(parts)


def _is_region(parts: list[str], part: str) -> bool:
    """Whether two small letters are a region (`zh-cn`) and not the other language of a direction."""
    before = next(one for one in reversed(parts) if len(one) < 4 and one.islower())  # before a script
    return f"{before}-{part}" in _REGIONAL


def metric_tokenizer(language: str, references: Sequence[str]) -> str:
    """sacreBLEU's tokenizer for texts: words where they are written apart, else characters.

    With the default `13a` a perfect Chinese sentence that differs in one character would score 0. The large languages
    have theirs whatever their texts hold; of all others most letters of the references decide, as one language may
    have several scripts (Hakka) and no list has every language.
    """
    base = language.split("-")[0]
    if base in _CHINESE:
        return "zh"
    if base in _BY_CHARACTER:
        return "char"
    unbroken = sum(len(_UNBROKEN.findall(text)) for text in references)
    letters = sum(sum(map(str.isalpha, text)) for text in references)
    return "char" if 2 * unbroken > letters else "13a"


def is_direction(tag: str) -> bool:
    """Whether a tag has the form of a direction (`en-de`, `zh-Hans-en`); so has `de-ba`, a dialect of labelled rows."""
    return _DIRECTION.fullmatch(tag) is not None


def target(tag: str) -> str:
    """The language that is written: of a direction (`en-de`) the second, else the tag itself."""
    found = _DIRECTION.fullmatch(tag)
    return found[2] if found else tag


def halves(tag: str) -> tuple[str, str]:
    """The languages of a pair's two halves: of a direction its two, else the tag itself twice."""
    found = _DIRECTION.fullmatch(tag)
    return (found[1], found[2]) if found else (tag, tag)


def task(name: str) -> str:
    """The task of a language in a multi-task corpus (`ner:de` -> `ner`), empty without one."""
    return name.partition(":")[0] if ":" in name else ""


def alone(name: str) -> str:
    """The language without its task (`ner:de` -> `de`)."""
    return name.rpartition(":")[2]


def nearest(tag: str, known: Iterable[str]) -> str | None:
    """The one of some languages that is the same, else the nearest related one (Danish for Norwegian), else None.

    By the distance of Unicode's CLDR: 4 between dialects, 12 between Norwegian and Danish, 24 between Slovak and Czech.
    What is no tag of BCP 47 (a market may be called `de-b2b`) is related to nothing.
    """
    known = list(known)
    if tag in known:
        return tag
    if not _is_tag(tag):
        return None
    among = [one for one in known if _is_tag(one)]
    found, _ = langcodes.closest_match(tag, among, max_distance=_RELATED)
    return found if found in among else None


def _is_tag(tag: str) -> bool:
    try:
        langcodes.Language.get(langcodes.standardize_tag(tag))  # as it is compared: `de-eur-b2b` is none then
    except LanguageTagError:
        return False
    return True


def words(text: str) -> list[str]:
    """Lower-case words for scores: runs of letters, marks and digits.

    In scripts without spaces each letter or mark is one, and a number is one as everywhere.
    """
    found: list[str] = []
    inside = False
    for character in unicodedata.normalize("NFC", text).casefold():
        kind = unicodedata.category(character)[0]
        if is_unspaced(character) and kind != "N":
            inside = False
            if kind in "LM":
                found.append(character)
        elif kind in "LMN":
            if inside:
                found[-1] += character
            else:
                found.append(character)
            inside = True
        else:
            inside = False
    return found


def is_unspaced(character: str) -> bool:
    """True for a character of a script that writes words without spaces (Han, kana, Thai, Lao, Khmer, Burmese)."""
    code = ord(character)
    return (
        0x3040 <= code <= 0x30FF  # kana
        or 0x3400 <= code <= 0x4DBF
        or 0x4E00 <= code <= 0x9FFF
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x323AF  # Han
        or 0x0E00 <= code <= 0x0EFF  # Thai, Lao
        or 0x1000 <= code <= 0x109F  # Burmese
        or 0x1780 <= code <= 0x17FF  # Khmer
    )


def count_words(text: str) -> int:
    """Words of a text: runs between spaces; in scripts without spaces each letter counts as one."""
    words = 0
    inside = False
    for character in text:
        if is_unspaced(character):
            words += unicodedata.category(character)[0] == "L"
            inside = False
        elif character.isspace():
            inside = False
        elif not inside and character.isalnum():
            words += 1
            inside = True
    return words
