"""Which language a request is in, and which adapter answers it.

The language is the one that is declared, else the one that `Accept-Language` prefers, else the one that is detected in
the text, else a default. The answer comes from the language's own adapter, else from that of a related language (by the
distance of Unicode's CLDR, such as Danish for Norwegian), else from the model without one. A reply says which it was.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import langcodes
from langcodes.tag_parser import LanguageTagError
from py3langid import langid

_RELATED = 25
"""CLDR's distance up to which one language is taken for another: dialects 4, Danish 12 from Norwegian, Czech 24 from
Slovak."""
_SURE = 0.5
"""Probability from which a detected language counts."""
_MAX_CHARS = 1000
"""Of a text that are looked at."""


class UnknownLanguageError(ValueError):
    """A tag that is none of BCP 47's."""


@dataclass(frozen=True)
class Route:
    """How a request is answered."""

    language: str
    """BCP 47."""
    known_by: Literal["declared", "header", "detected", "default"]
    step: Literal["language", "related", "base"]
    adapter: str | None
    """None: the model without one."""


def route(
    text: str,
    *,
    declared: str | None = None,
    header: str | None = None,
    spoken: Collection[str] = (),
    default: str = "en",
    adapters: Mapping[str, str] | None = None,
) -> Route:
    """The way of a request.

    Args:
        text: of the customer.
        declared: a tag in the request.
        header: `Accept-Language`.
        spoken: languages among which the text's is detected; empty: all that the detector knows.
        default: where nothing else tells.
        adapters: language -> its adapter.

    Raises:
        UnknownLanguageError: `declared` is no tag of a language.
    """
    language, known_by = _language(text, declared, header, spoken, default)
    step, adapter = _adapter(language, adapters or {})
    return Route(language, known_by, step, adapter)


def _language(
    text: str, declared: str | None, header: str | None, spoken: Collection[str], default: str
) -> tuple[str, Literal["declared", "header", "detected", "default"]]:
    if declared is not None:
        return known(declared), "declared"
    if header and (preferred := _preferred(header)):
        return preferred, "header"
    if found := detect(text, spoken):
        return found, "detected"
    return default, "default"


def known(tag: str) -> str:
    """The tag in its standard form.

    Raises:
        UnknownLanguageError: it is none, or names a language that is in no registry.
    """
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


def detect(text: str, spoken: Collection[str] = ()) -> str | None:
    """The language of a text, or None if it does not tell: no letters, or no language that is likelier than not."""
    if not any(character.isalpha() for character in text):
        return None
    language, probability = _detector(frozenset(tag.split("-")[0] for tag in spoken)).classify(
        text[:_MAX_CHARS]
    )
    return str(language) if probability >= _SURE else None


@functools.lru_cache(maxsize=8)
def _detector(spoken: frozenset[str]) -> langid.LanguageIdentifier:
    found = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if among := sorted(spoken & set(found.nb_classes)):
        found.set_languages(among)
    return found


def _adapter(
    language: str, adapters: Mapping[str, str]
) -> tuple[Literal["language", "related", "base"], str | None]:
    if language in adapters:
        return "language", adapters[language]
    nearest, distance = langcodes.closest_match(language, list(adapters), max_distance=_RELATED)
    if nearest not in adapters:
        return "base", None
    return ("language" if distance == 0 else "related"), adapters[nearest]
