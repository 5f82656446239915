"""What a customer may want next: by sessions of others where the champion has learnt from them, else by texts.

    sessions    the bundle's recommender, where it knows the market, and a product of the session (or there is none yet)
    texts       what lies nearest to the mean of the products of the session; also where the first finds too few
    items       the same by what the recommender has learnt of each product, in a shop whose products have no texts

A market is no language: that of the United Kingdom, `uk`, is not related to that of Russia. So only a market's own tag,
or its first part, counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from mlray.config import Serving
from mlray.corpus import sessions
from mlray.objectives.recommending import NextItem
from serve_app.batching import Batcher
from serve_app.catalogue import Catalogue, apart
from serve_app.errors import ApiError
from serve_app.routing import BASE, Step

By = Literal["sessions", "texts", "items"]

_PER_TOKEN = 256
"""Scores that cost as much as reading a token, about."""


@dataclass(frozen=True)
class Session:
    """What a customer has looked at, the last product last."""

    products: tuple[str, ...]
    market: str
    query: str
    """What the customer has searched for; empty if that is not known."""


@dataclass(frozen=True)
class Sessions:
    """A recommender, and what waits for it."""

    model: NextItem
    batcher: Batcher[Session, np.ndarray]
    _sold: dict[str, tuple[int, list[str], np.ndarray]] = field(default_factory=dict, repr=False)
    """Market -> version of the catalogue, products that are sold there and known here, their columns of the scores."""

    @classmethod
    def of(cls, model: NextItem, settings: Serving) -> Sessions:
        """Sessions of many customers and markets in one forward pass."""

        def run(batch: list[Session]) -> np.ndarray:
            told = [sessions.with_query(" ".join(one.products), one.query) for one in batch]
            return model.scores(told, [one.market for one in batch])

        batcher = Batcher[Session, np.ndarray](
            run,
            lambda one: 1 + len(one.products) + sessions.WORDS + len(model.items) // _PER_TOKEN,
            budget=settings.batch_tokens,
            capacity=settings.queued_tokens,
            patience_s=settings.timeout_s,
        )
        return cls(model, batcher)

    def sold(self, catalogue: Catalogue, market: str) -> tuple[list[str], np.ndarray]:
        """The products of a market that the model knows, and their columns (N,) of the scores."""
        version = catalogue.version
        if self._sold.get(market, (None,))[0] != version:
            names = [name for name in catalogue.names(market) if name in self.model.items]
            columns_N = np.array([self.model.items[name] for name in names], dtype=np.int64)
            self._sold[market] = version, names, columns_N
        return self._sold[market][1:]

    def market(self, tag: str) -> str | None:
        """What the model calls a market; None if it does not know it."""
        return next((one for one in (tag, tag.partition("-")[0]) if one in self.model.markets), None)

    def step(self, tag: str) -> Step:
        """By which adapter the sessions of a market are read."""
        known = self.market(tag)
        return Step("language", known) if known in self.model.adapters else BASE


@dataclass(frozen=True)
class Found:
    """A product, and how it was found."""

    id: str
    score: float
    title: str | None
    by: By


@dataclass(frozen=True)
class Wanted:
    """Products that may be wanted next, the best first, and what became of the session."""

    products: list[Found]
    unknown: list[str]
    """Of the session's."""
    step: Step
    """By which adapter its market was read."""


async def recommend(
    catalogue: Catalogue,
    learnt: Sessions | None,
    session: Session,
    k: int,
    near_by: By = "texts",
) -> Wanted:
    """The k products of a market that may be wanted next, without those of the session.

    Args:
        catalogue: what is sold.
        learnt: of the champion, if it has a recommender.
        session: in a market of the catalogue.
        k: products, at most.
        near_by: what the vectors of the catalogue are made of.

    Raises:
        ApiError: too much waits, none of its products is known, or there is neither a model for the market nor a
            product to go by.
    """
    market, found = session.market, list[Found]()
    products, held = await apart(_known, catalogue, learnt, market, session.products)
    known = learnt.market(market) if learnt else None
    if learnt and known and (not products or any(one in learnt.model.items for one in products)):
        asked = replace(session, products=tuple(products), market=known)
        (scores_V,) = await learnt.batcher.submit(known, [asked])
        found = await apart(_best, catalogue, learnt, market, products, scores_V, k)
    if not found and not held:
        raise ApiError(
            422, "invalid_request", "products: name one, as nothing is known of sessions in this market"
        )
    if len(found) < k and held:
        there = {one.id for one in found}
        near = await apart(catalogue.like, market, held, k + len(found))
        found += [Found(*one, near_by) for one in near if one[0] not in there][: k - len(found)]
    by_sessions = learnt is not None and any(one.by == "sessions" for one in found)
    step = learnt.step(market) if learnt and by_sessions else BASE
    return Wanted(found, [one for one in session.products if one not in products], step)


def _best(
    catalogue: Catalogue, learnt: Sessions, market: str, products: Sequence[str], scores_V: np.ndarray, k: int
) -> list[Found]:
    names, columns_N = learnt.sold(catalogue, market)
    seen = np.unique([learnt.model.items[one] for one in products if one in learnt.model.items])
    scores_N = np.where(np.isin(columns_N, seen), -np.inf, scores_V[columns_N])
    order = np.argsort(-scores_N, kind="stable")[:k]
    best = [(names[place], float(scores_N[place])) for place in order if scores_N[place] > -np.inf]
    titles = catalogue.titles(market, [name for name, _ in best])
    return [Found(name, score, title, "sessions") for (name, score), title in zip(best, titles, strict=True)]


def _known(
    catalogue: Catalogue, learnt: Sessions | None, market: str, products: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Those that the market sells or the recommender has learnt of; and of these those that are sold.

    Raises:
        ApiError: there are some, and none of them is known.
    """
    items = learnt.model.items if learnt else {}
    gone = set(catalogue.unknown([(market, one) for one in products]))
    held = [one for one in products if (market, one) not in gone]
    found = [one for one in products if one in items or (market, one) not in gone]
    if products and not found:
        raise ApiError(404, "unknown_product", "none of these products is known")
    return found, held
