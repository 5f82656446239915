"""What a customer may want next: by sessions of others where the champion has learnt from them, else by texts.

sessions    the bundle's recommender, told the market or a related one
texts       what lies nearest to the mean of the products of the session
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlray.config import Serving
from mlray.objectives.recommending import NextItem
from serve_app import routing
from serve_app.batching import Batcher, Overloaded
from serve_app.catalogue import Catalogue
from serve_app.errors import ApiError

_PER_TOKEN = 256
"""Scores that cost as much as reading a token, about."""
_FIRST = 64
"""Items that are ordered at first; where too few of them are sold, four times as many."""


@dataclass(frozen=True)
class Session:
    """What a customer has looked at, the last product last."""

    products: tuple[str, ...]
    market: str
    """As the recommender knows it."""


Sessions = Batcher[Session, np.ndarray]


def batcher(model: NextItem, settings: Serving) -> Sessions:
    """Sessions of many customers and markets in one forward pass."""

    def run(batch: list[Session]) -> np.ndarray:
        return model.scores([" ".join(one.products) for one in batch], [one.market for one in batch])

    return Batcher[Session, np.ndarray](
        run,
        lambda one: 1 + len(one.products) + len(model.items) // _PER_TOKEN,
        budget=settings.batch_tokens,
        capacity=settings.queued_tokens,
        patience_s=settings.timeout_s,
    )


@dataclass(frozen=True)
class Found:
    """Products and how they were found."""

    products: list[tuple[str, float, str | None]]
    """Id, score and title."""
    by: Literal["sessions", "texts"]
    step: routing.Step


async def recommend(
    catalogue: Catalogue,
    model: NextItem | None,
    sessions: Sessions | None,
    market: str,
    products: Sequence[str],
    k: int,
) -> Found:
    """The k products of a market that may be wanted next, without those of the session.

    Args:
        catalogue: what is sold.
        model: of sessions, if there is one.
        sessions: its `batcher`.
        market: one of the catalogue's.
        products: of the session that the catalogue or the model knows.
        k: products, at most.

    Raises:
        ApiError: too much waits, or there is neither a model for the market nor a product to go by.
    """
    step = routing.step(market, model.markets) if model else routing.BASE
    if model and sessions and step.adapter:
        try:
            (scores_V,) = await sessions.submit(step.adapter, [Session(tuple(products), step.adapter)])
        except Overloaded as error:
            raise ApiError(
                429, "overloaded", "too much waits; try again later", error.retry_after_s
            ) from None
        own = set(products)
        names = [name for name in model.items if name not in own]
        numbers = np.array([model.items[name] for name in names], np.int64)
        ranked = _best_first(names, scores_V[numbers])
        sold = catalogue.sold(market, ranked, k)
        return Found(
            [(name, float(scores_V[model.items[name]]), title) for name, title in sold], "sessions", step
        )
    held = [name for name in products if not catalogue.unknown([(market, name)])]
    if not held:
        raise ApiError(
            422, "invalid_request", "products: name one, as nothing is known of sessions in this market"
        )
    return Found(catalogue.like(market, held, k), "texts", routing.BASE)


def _best_first(names: Sequence[str], scores_N: np.ndarray) -> Iterator[str]:
    """Names by falling score; no more of them are ordered than are taken."""
    told, size = 0, _FIRST
    while told < len(names):
        size = min(size, len(names))
        first = np.argpartition(-scores_N, size - 1)[:size]
        ordered = first[np.argsort(-scores_N[first], kind="stable")]
        yield from (names[number] for number in ordered[told:].tolist())
        told, size = size, 4 * size


def known(catalogue: Catalogue, model: NextItem | None, market: str, products: Sequence[str]) -> list[str]:
    """Those that the market sells, or that the recommender has learnt of.

    Raises:
        ApiError: there are some, and none of them is known.
    """
    items: Any = model.items if model else {}
    found = [one for one in products if one in items or not catalogue.unknown([(market, one)])]
    if products and not found:
        raise ApiError(404, "unknown_product", "none of these products is known")
    return found
