"""Translations by the champion's translator: which way a text goes, and many texts in one call of the model.

The direct direction is taken if the bundle was judged on it and it is good enough; else the way through the pivot
language, where both of its legs together are better. What the bundle was never judged on is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlray import languages
from mlray.config import Serving
from mlray.evaluation.report import Report
from mlray.release.companions import Translator
from serve_app import routing
from serve_app.batching import Batcher, Overloaded
from serve_app.errors import ApiError
from serve_app.protection import Protected, protect

METRIC = "chrF"
"""By which a direction is judged: of 100."""
_PER_TOKEN = 32
"""A token that is written costs so many that are read by an encoder, about."""


@dataclass(frozen=True)
class Leg:
    """A text on its way from one language into another."""

    text: str
    source: str
    target: str


Legs = Batcher[Leg, str]


def batcher(model: Translator, settings: Serving) -> Legs:
    """Texts of many customers; those of one direction are translated together."""

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

    return Batcher[Leg, str](
        run,
        lambda leg: 1 + len(leg.text) // 4 * _PER_TOKEN,
        budget=settings.batch_tokens * _PER_TOKEN // 4,
        capacity=settings.queued_tokens * _PER_TOKEN // 4,
        patience_s=settings.timeout_s,
    )


@dataclass(frozen=True)
class Way:
    """The languages that a text goes through, as the model knows them."""

    languages: tuple[str, ...]
    quality: float
    """chrF of the bundle's own evaluation; of two legs their product."""


def way(source: str, target: str, judged: Mapping[str, float], pivot: str, weak: float) -> Way | None:
    """How a text gets from one language into another; None: it does not.

    Args:
        source: tag.
        target: tag.
        judged: direction (`en-de`) -> chrF, of what the translator was judged on.
        pivot: language of the detour.
        weak: chrF below which a detour is looked at.
    """
    known = {half for name in judged for half in languages.halves(name)}
    of, into = (languages.nearest(tag, known) for tag in (source, target))
    if of is None or into is None:
        return None
    if of == into:
        return Way((of,), 100.0)
    direct = judged.get(f"{of}-{into}")
    if direct is not None and direct >= weak:
        return Way((of, into), direct)
    legs = judged.get(f"{of}-{pivot}"), judged.get(f"{pivot}-{into}")
    if pivot not in {of, into} and legs[0] is not None and legs[1] is not None:
        through = legs[0] * legs[1] / 100.0
        if direct is None or through > direct:
            return Way((of, pivot, into), through)
    return None if direct is None else Way((of, into), direct)


def choose(report: Report, source: str, target: str, settings: Serving) -> Way:
    """The way between two languages by a bundle's report.

    Raises:
        ApiError: the target is no tag, or there is no way.
    """
    try:
        into = routing.known(target)
    except routing.UnknownLanguageError as error:
        raise ApiError(422, "unknown_language", f"target: {error}") from None
    judged = {name: row[METRIC].value for name, row in report.cells.get("translation", {}).items()}
    path = way(source, into, judged, settings.pivot, settings.weak)
    if path is None:
        known = ", ".join(sorted(judged))
        raise ApiError(
            404, "unknown_direction", f"there is no way from {source} into {into}; there are {known}"
        )
    return path


@dataclass(frozen=True)
class Translation:
    """A text in another language."""

    text: str
    kept: tuple[str, ...]
    """What was protected, as it stands in the translation."""
    whole: bool
    """False: its parts between what was protected were translated one by one."""


async def translate(
    legs: Legs, texts: Sequence[str], path: Way, glossary: Mapping[str, str], names: Sequence[str]
) -> list[Translation]:
    """Translations in the order of `texts`, in which all that is protected stands.

    Raises:
        ApiError: too much waits.
    """
    apart = [protect(text, glossary, names) for text in texts]
    if len(path.languages) == 1:
        return [Translation(one.join(one.free), one.kept, True) for one in apart]
    told = await _along(legs, [one.masked for one in apart], path)
    restored = [one.restore(text) for one, text in zip(apart, told, strict=True)]
    broken = [place for place, text in enumerate(restored) if text is None]
    parts = iter(await _along(legs, [part for place in broken for part in apart[place].free], path))
    joined = {place: _joined(apart[place], parts) for place in broken}
    return [
        Translation(joined[place] if text is None else text, one.kept, text is not None)
        for place, (one, text) in enumerate(zip(apart, restored, strict=True))
    ]


def _joined(one: Protected, parts: Iterator[str]) -> str:
    return one.join([next(parts) for _ in one.free])


async def _along(legs: Legs, texts: Sequence[str], path: Way) -> list[str]:
    """Texts at the end of the way; those without a letter stay as they are."""
    found = list(texts)
    places = [place for place, text in enumerate(texts) if any(letter.isalpha() for letter in text)]
    for source, target in zip(path.languages[:-1], path.languages[1:], strict=True):
        try:
            written = await legs.submit(
                target, [Leg(found[place].strip(), source, target) for place in places]
            )
        except Overloaded as error:
            raise ApiError(
                429, "overloaded", "too much waits; try again later", error.retry_after_s
            ) from None
        for place, text in zip(places, written, strict=True):
            found[place] = text
    return found
