"""Customer service: the answer of the shop's own knowledge that fits what a customer asks, or a person.

The customer's language is searched first, then a related one, then all: an answer in another language is told as such.
What a customer has said before counts, but less than the last message. Below `serving.confidence` nothing is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlray import languages
from serve_app import routing
from serve_app.catalogue import Catalogue

_WEIGHTS = (1.0, 0.3, 0.1)
"""Of a customer's messages, the last one first; earlier ones are not looked at."""


@dataclass(frozen=True)
class Source:
    """An answer of the knowledge base."""

    id: str
    """What it is about: the intent."""
    language: str
    text: str
    score: float
    """Cosine similarity to what was asked."""


@dataclass(frozen=True)
class Found:
    """What fits a question, the nearest first, and where it was looked for."""

    sources: tuple[Source, ...]
    scope: str
    """`language`: in the customer's own; `related`; `other`: in all others."""


def looked_at(messages: Sequence[str]) -> list[str]:
    """The messages that count, the last one first."""
    return list(reversed(messages))[: len(_WEIGHTS)]


def question(vectors_MH: np.ndarray) -> np.ndarray:
    """One vector (H,) of a conversation, from those of its messages that are `looked_at`."""
    summed: np.ndarray = np.array(_WEIGHTS[: len(vectors_MH)], np.float32) @ vectors_MH
    found: np.ndarray = summed / max(float(np.linalg.norm(summed)), 1e-12)
    return found


def find(knowledge: Catalogue, vector_H: np.ndarray, language: str, k: int, confidence: float) -> Found:
    """The k answers nearest to a question: of the first scope in which one is sure enough, else of the best one."""
    known = list(knowledge.markets)
    own = languages.nearest(language, known)
    scopes: list[tuple[str, list[str]]] = [("other", [one for one in known if one != own])]
    if own is not None:
        scopes.insert(0, (routing.nearness(language, own), [own]))
    best = Found((), "other")
    for scope, among in scopes:
        found = Found(_nearest(knowledge, vector_H, among, k), scope)
        if not best.sources or (found.sources and found.sources[0].score > best.sources[0].score):
            best = found
        if found.sources and found.sources[0].score >= confidence:
            return found
    return best


def reply(found: Found, confidence: float) -> dict[str, Any]:
    """What a customer is told, in the words of the best source; a person takes over where none is sure enough."""
    first = found.sources[0] if found.sources else None
    best = first if first and first.score >= confidence else None
    return {
        "answer": best.text if best else None,
        "written": False,
        "translated": False,
        "intent": best.id if best else None,
        "language": best.language if best else None,
        "confidence": first.score if first else 0.0,
        "hand_over": best is None,
        "scope": found.scope,
        "sources": [asdict(one) for one in found.sources],
    }


def _nearest(knowledge: Catalogue, vector_H: np.ndarray, among: Sequence[str], k: int) -> tuple[Source, ...]:
    found = [
        Source(name, language, title or "", score)
        for language in among
        for name, score, title in knowledge.search(language, vector_H, k)
    ]
    return tuple(sorted(found, key=lambda one: -one.score)[:k])
