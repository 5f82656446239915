"""Translations by the champion's translator: which way a text goes, and many sentences in one call of the model.

The direct direction is taken if the bundle was judged on it and it is good enough; else the way through the pivot
language, where both of its legs together are better. What the bundle was never judged on is refused. Texts are
translated sentence by sentence, as translators are trained; a sentence that the model would cut is refused.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import langcodes

from mlray import languages
from mlray.config import Serving
from mlray.evaluation.report import Report
from mlray.release.companions import Translator
from serve_app import routing
from serve_app.batching import Batcher
from serve_app.errors import ApiError
from serve_app.protection import Protected, Protector

log = logging.getLogger("mlray.serve")

METRIC = "chrF"
"""By which a direction is judged: of 100."""
PER_TOKEN, _LEAST = 32, 8
"""A token that is written costs so many that are read by an encoder, about; and the fewest that a text counts as."""
_WORK = 4_000_000
"""Words of a glossary times characters of the texts: half a second."""
_WORKERS = ThreadPoolExecutor(2, thread_name_prefix="translate")
"""Take texts apart; nothing else may keep them busy."""


@dataclass(frozen=True)
class Leg:
    """A sentence on its way from one language into another."""

    text: str
    source: str
    target: str
    tokens: int


@dataclass(frozen=True)
class Legs:
    """A translator, and what waits for it."""

    model: Translator
    batcher: Batcher[Leg, str]
    capacity: int
    """Cost of a request, at most."""

    @classmethod
    def of(cls, model: Translator, settings: Serving) -> Legs:
        """Sentences of many customers; those of one direction are translated together."""

        def run(batch: list[Leg]) -> list[str]:
            found = [""] * len(batch)
            groups: dict[tuple[str, str], list[int]] = defaultdict(list)
            for place, leg in enumerate(batch):
                groups[leg.source, leg.target].append(place)
            for (source, target), places in groups.items():
                texts = model.translate([batch[place].text for place in places], source, target)
                for place, text in zip(places, texts, strict=True):
                    found[place] = text
            return found

        capacity = settings.queued_tokens * PER_TOKEN // 4
        batcher = Batcher[Leg, str](
            run,
            cost,
            budget=settings.batch_tokens * PER_TOKEN // 4,
            capacity=capacity,
            patience_s=settings.timeout_s,
        )
        return cls(model, batcher, capacity)


def cost(leg: Leg) -> int:
    """What a sentence costs, in tokens that an encoder reads."""
    return max(leg.tokens, _LEAST) * PER_TOKEN


@dataclass(frozen=True)
class Way:
    """The languages that a text goes through, as the model knows them."""

    languages: tuple[str, ...]
    quality: float | None
    """chrF of the bundle's own evaluation; of two legs their product; None: nothing is translated."""
    step: Literal["language", "related", "pivot"] = "language"


def way(source: str, target: str, judged: Mapping[str, float], pivot: str, weak: float) -> Way | None:
    """How a text gets from one language into another; None: it does not.

    Args:
        source: tag.
        target: tag.
        judged: direction (`en-de`) -> chrF, of what the translator was judged on.
        pivot: language of the detour.
        weak: chrF below which a detour is looked at.
    """
    if f"{source}-{target}" not in judged and _alike(source, target):
        return Way((source,), None)
    known = {half for name in judged for half in languages.halves(name)}
    of, into = (languages.nearest(tag, known) for tag in (source, target))
    # The two may be one to the model: Ukrainian and Russian, if it has only the latter.
    if of is None or into is None or of == into:
        return None
    near = {routing.nearness(source, of), routing.nearness(target, into)}
    step: Literal["language", "related"] = "related" if "related" in near else "language"
    direct = judged.get(f"{of}-{into}")
    if direct is not None and direct >= weak:
        return Way((of, into), direct, step)
    legs = judged.get(f"{of}-{pivot}"), judged.get(f"{pivot}-{into}")
    if pivot not in {of, into} and legs[0] is not None and legs[1] is not None:
        through = legs[0] * legs[1] / 100.0
        if direct is None or through > direct:
            return Way((of, pivot, into), through, "pivot")
    return None if direct is None else Way((of, into), direct, step)


def _alike(source: str, target: str) -> bool:
    """Whether a text of one is a text of the other: the same language in the same script."""
    if source.partition("-")[0] != target.partition("-")[0]:
        return False
    scripts = {langcodes.Language.get(tag).maximize().script for tag in (source, target)}
    return len(scripts) == 1


async def answer(
    legs: Legs, report: Report, text: str, source: str, target: str, settings: Serving
) -> str | None:
    """An answer in the customer's language; None: there is no way between just these two that is good enough.

    It waits with others for the same customers: what is asked from the answers' language is no reason to wait.
    """
    try:
        path = way(source, target, _judged(report), settings.pivot, settings.weak)
        if path is None or path.quality is None or path.quality < settings.weak:
            return None
        if not (_alike(source, path.languages[0]) and _alike(target, path.languages[-1])):
            return None  # it would be in a related language, which the customer has not asked for
        (found,) = await translate(legs, [text], path, {}, [], queue=path.languages[-1])
    except ApiError:
        return None
    except Exception as error:  # the answer stands whatever a model does
        log.error("an answer could not be translated: %s", type(error).__name__)
        return None
    return found.text


def choose(report: Report, source: str, target: str, settings: Serving) -> Way:
    """The way between two languages by a bundle's report.

    Raises:
        ApiError: the target is no tag, or there is no way.
    """
    try:
        into = routing.known(target)
    except routing.UnknownLanguageError as error:
        raise ApiError(422, "unknown_language", f"target: {error}") from None
    judged = _judged(report)
    path = way(source, into, judged, settings.pivot, settings.weak)
    if path is None:
        known = ", ".join(sorted(judged))
        raise ApiError(
            404, "unknown_direction", f"there is no way from {source} into {into}; there are {known}"
        )
    return path


def _judged(report: Report) -> dict[str, float]:
    return {name: row[METRIC].value for name, row in report.cells.get("translation", {}).items()}


@dataclass(frozen=True)
class Translation:
    """A text in another language."""

    text: str
    kept: tuple[str, ...]
    """What was protected, as it stands in the translation."""
    whole: bool
    """False: in a sentence the parts between what was protected were translated one by one."""


async def translate(
    legs: Legs,
    texts: Sequence[str],
    path: Way,
    glossary: Mapping[str, str],
    names: Sequence[str],
    queue: str | None = None,
) -> list[Translation]:
    """Translations in the order of `texts`, in which all that is protected stands.

    Args:
        legs: of the translator.
        texts: what is translated.
        path: its languages.
        glossary: word -> its translation.
        names: words that stay.
        queue: in which the texts wait; without it with others of their language.

    Raises:
        ApiError: a sentence is longer than the model reads, it is too much at once, or too much waits.
    """
    loop = asyncio.get_running_loop()
    apart = await loop.run_in_executor(_WORKERS, _apart, texts, glossary, names)
    sentences = [one for text in apart for one in text if isinstance(one, Protected)]
    told = iter(await _sentences(legs, sentences, path, queue or path.languages[0]))
    return [_whole(text, told) for text in apart]


def _whole(text: Sequence[Protected | str], told: Iterator[tuple[str, bool]]) -> Translation:
    """A text of its sentences, which are the next of `told`, and of what lies between them."""
    parts = [(one, True) if isinstance(one, str) else next(told) for one in text]
    kept = tuple(kept for one in text if isinstance(one, Protected) for kept in one.kept)
    return Translation("".join(part for part, _ in parts), kept, all(whole for _, whole in parts))


def _apart(
    texts: Sequence[str], glossary: Mapping[str, str], names: Sequence[str]
) -> list[list[Protected | str]]:
    """The sentences of each text, and what lies between."""
    protector = Protector(texts, glossary, names)
    if protector.work > _WORK:
        raise ApiError(
            413, "glossary_too_large", "so many words are not looked for in so much text; send it in parts"
        )
    return [protector.protect(text).sentences() for text in texts]


async def _sentences(
    legs: Legs, sentences: Sequence[Protected], path: Way, queue: str
) -> list[tuple[str, bool]]:
    """Each sentence in the other language, and whether it was translated as a whole."""
    if len(path.languages) == 1:
        return [(one.join(one.free), True) for one in sentences]
    masked = await _along(legs, [one.masked for one in sentences], path, queue)
    whole = [one.restore(text) for one, text in zip(sentences, masked, strict=True)]
    broken = [one for one, text in zip(sentences, whole, strict=True) if text is None]
    parts = iter(await _along(legs, [part for one in broken for part in one.free], path, queue))
    joined = iter([_joined(one, parts) for one in broken])
    return [(next(joined), False) if text is None else (text, True) for text in whole]


def _joined(one: Protected, parts: Iterator[str]) -> str:
    return one.join([next(parts) for _ in one.free])


async def _along(legs: Legs, texts: Sequence[str], path: Way, queue: str) -> list[str]:
    """Texts at the end of the way; those without a letter stay as they are."""
    found = list(texts)
    places = [place for place, text in enumerate(texts) if any(letter.isalpha() for letter in text)]
    for source, target in zip(path.languages[:-1], path.languages[1:], strict=True):
        asked = [found[place].strip() for place in places]
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(_WORKERS, legs.model.lengths, asked)
        # What the model has written itself on the first leg may be longer; it reads that all the same.
        if source == path.languages[0] and (longest := max(tokens, default=0)) > legs.model.room:
            raise ApiError(
                413,
                "text_too_long",
                f"a sentence of {longest:,} tokens; the translator reads {legs.model.room:,} at most",
            )
        own = [Leg(text, source, target, size) for text, size in zip(asked, tokens, strict=True)]
        if sum(map(cost, own)) > legs.capacity:
            raise ApiError(413, "too_many_texts", "this is too much to translate at once; send it in parts")
        for place, text in zip(places, await legs.batcher.submit(queue, own), strict=True):
            found[place] = text
    return found
