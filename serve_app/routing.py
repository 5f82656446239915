"""Which language a request is in, and which adapter answers it.

The language is the one that is declared, else the one that `Accept-Language` prefers, else the one that is detected in
the text, else a default. The answer comes from the adapter of the market (or of a declared language), else from that of
a related one (see `languages.nearest`), else from the model without one. A reply says which it was.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import langcodes
from langcodes.tag_parser import LanguageTagError
from py3langid import langid

from mlray import languages

_SURE, _FOREIGN = 0.5, 0.9
"""Probability from which a detected language counts, and from which one that is not expected does: of whole sentences
of eight languages in Tatoeba 0.3 % at most are then taken for others, and 39 to 100 % of nine others are known."""
_MAX_CHARS = 1000
"""Of a text that are looked at."""


_KEPT = 10_000
"""Tags that langcodes may remember: it forgets none by itself, and whoever asks may make up as many as he likes."""


class UnknownLanguageError(ValueError):
    """A tag that is none of BCP 47's."""


@dataclass(frozen=True)
class Spoken:
    """The language of a request, and how it is known."""

    language: str
    """BCP 47."""
    known_by: Literal["declared", "header", "detected", "default"]


@dataclass(frozen=True)
class Step:
    """Which adapter answers: the one that was asked for, a related one, or none; `pivot`: through a third language."""

    step: Literal["language", "related", "base", "pivot"]
    adapter: str | None


BASE = Step("base", None)


def spoken(
    text: str,
    *earlier: str,
    declared: str | None = None,
    header: str | None = None,
    among: Collection[str] = (),
    default: str = "en",
) -> Spoken:
    """The language of a text.

    Args:
        text: of the customer.
        earlier: what he has said before, the last first: an order number is of no language.
        declared: a tag in the request.
        header: `Accept-Language`.
        among: languages that are expected; empty: all that the detector knows.
        default: where nothing else tells.

    Raises:
        UnknownLanguageError: `declared` is no tag of a language.
    """
    if declared is not None:
        return Spoken(known(declared), "declared")
    if header and (preferred := _preferred(header)):
        return Spoken(preferred, "header")
    for one in (text, *earlier):
        if found := detect(one, among):
            return Spoken(found, "detected")
    return Spoken(default, "default")


def step(tag: str, adapters: Collection[str]) -> Step:
    """The adapter for a market or a language, among those that there are."""
    found = languages.nearest(tag, adapters)
    if found is None:
        return BASE
    return Step(nearness(tag, found), found)


def nearness(tag: str, found: str) -> Literal["language", "related"]:
    """Whether what was found for a tag is of its language, or of a related one."""
    return "language" if found in {tag, tag.partition("-")[0]} else "related"


def known(tag: str) -> str:
    """The tag in its standard form.

    Raises:
        UnknownLanguageError: it is none, or names a language that is in no registry.
    """
    for cache in (langcodes.Language._INSTANCES, langcodes.Language._PARSE_CACHE):
        if len(cache) > _KEPT:
            cache.clear()
    try:
        if tag.isascii() and langcodes.tag_is_valid(tag):
            return langcodes.standardize_tag(tag)
    except LanguageTagError:
        pass
    raise UnknownLanguageError("the language is no tag of BCP 47 such as en, pt-BR or zh-Hant")


def _preferred(header: str) -> str | None:
    """The first of the languages with the highest weight; what is no tag is passed over (RFC 9110, 12.5.4)."""
    best, weight = None, 0.0
    for part in header.split(",")[:32]:
        tag, _, rest = part.strip().partition(";")
        name, _, value = rest.strip().partition("=")
        try:
            quality = float(value) if name.strip() == "q" else 1.0
            if quality > weight and tag != "*":
                best, weight = known(tag.strip()), quality
        except ValueError:
            continue
    return best


def detect(text: str, expected: Collection[str] = ()) -> str | None:
    """The language of a text, or None if it does not tell: no letters, or no language that is likelier than not.

    A few words look like several languages, so one that is not expected has to be almost certain.
    """
    if not any(character.isalpha() for character in text):
        return None
    ranked = _detector().rank(text[:_MAX_CHARS])
    among = {tag.split("-")[0] for tag in expected}
    likely = [(language, probability) for language, probability in ranked if language in among]
    if likely and (ranked[0][0] in among or ranked[0][1] < _FOREIGN):
        ranked = likely
    language, probability = ranked[0]
    return str(language) if probability >= _SURE * sum(own for _, own in ranked) else None


@functools.cache
def _detector() -> langid.LanguageIdentifier:
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
