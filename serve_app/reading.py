"""A champion with what waits for it: texts of many requests are cut, put together, and read with their adapters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from mlray.config import ConfigError, RunError, Serving
from serve_app import routing, translating
from serve_app.adapters import Adapters, Unloadable
from serve_app.batching import LOADED, Batcher
from serve_app.catalogue import Catalogue
from serve_app.champion import Champion, Cut
from serve_app.errors import ApiError
from serve_app.recommending import Sessions
from serve_app.support import Source
from serve_app.translating import Legs
from serve_app.writing import Writing

log = logging.getLogger("mlray.serve")

T = TypeVar("T")

_OTHER = "other"
"""Queue of the languages that the champion was not judged in: a made-up tag gets no queue of its own."""
_CUTTERS = ThreadPoolExecutor(2, thread_name_prefix="cut")
"""Tokenise; nothing else may keep them busy."""


@dataclass(frozen=True)
class Reading:
    """Requests that began with a champion end with it."""

    champion: Champion
    batcher: Batcher[Cut, np.ndarray] = field(repr=False)
    adapters: Adapters = field(repr=False)
    queues: frozenset[str]
    sessions: Sessions | None = field(repr=False)
    legs: Legs | None = field(repr=False)
    """Of translations."""
    writing: Writing | None = field(repr=False)
    """Of answers."""
    settings: Serving = field(repr=False)

    @classmethod
    def of(cls, champion: Champion, settings: Serving, used: Sequence[str] = ()) -> Reading:
        """A champion that is ready: adapters that are pinned, or `used` before it, and its detector are in memory."""
        routing.detect("warm", champion.languages)
        batcher = Batcher[Cut, np.ndarray](
            champion.read,
            lambda one: len(one.tokens),
            budget=settings.batch_tokens,
            capacity=settings.queued_tokens,
            patience_s=settings.timeout_s,
        )
        pinned = [one for one in settings.pinned if one in champion.adapters]
        others = [one for one in used if one in champion.adapters and one not in pinned]
        room = max(settings.adapters - len(pinned), 0)
        last = others[max(len(others) - room, 0) :]  # those that were asked for last
        loaded = [one for one in (*last, *pinned) if _warmed(champion, one)]
        adapters = Adapters(
            champion.load,
            champion.unload,
            capacity=settings.adapters,
            patience_s=settings.timeout_s * LOADED,
            pinned=settings.pinned,
            loaded=loaded,
        )
        queues = frozenset(one.partition("-")[0] for one in champion.languages)
        sessions = Sessions.of(champion.recommender, settings) if champion.recommender else None
        legs = Legs.of(champion.translator, settings) if champion.translator else None
        writing = Writing.of(champion.writer, settings) if champion.writer else None
        return cls(champion, batcher, adapters, queues, sessions, legs, writing, settings)

    def products(self) -> Catalogue:
        """What is sold.

        Raises:
            ApiError: it has no index of products.
        """
        return self.held(self.champion.catalogue, "no_index", "an index of products")

    def answers(self) -> Catalogue:
        """What customer service answers with.

        Raises:
            ApiError: it has none.
        """
        return self.held(self.champion.knowledge, "no_knowledge", "answers")

    def selling(self, market: str) -> Catalogue:
        """Its products, if some are sold in a market.

        Raises:
            ApiError: none are.
        """
        catalogue = self.products()
        if market not in (markets := catalogue.markets):
            told = f"there is no such market; there are {', '.join(markets)}"
            raise ApiError(404, "unknown_market", told)
        return catalogue

    def held(self, part: T | None, code: str, what: str) -> T:
        """A part of what serves, if its bundle holds it.

        Raises:
            ApiError: it does not.
        """
        if part is None:
            raise ApiError(404, code, f"{self.champion.event.bundle} is served without {what}")
        return part

    def queue(self, language: str) -> str:
        """Where texts of a language wait."""
        primary = language.partition("-")[0]
        return primary if primary in self.queues else _OTHER

    async def vectors(
        self, texts: Sequence[str], language: str, wanted: str | None
    ) -> tuple[np.ndarray, int, routing.Step]:
        """Vectors (N, H), the tokens read, and the step that answered.

        Args:
            texts: what is read.
            language: in whose queue they wait.
            wanted: the market, or the language, whose adapter is to read them; None for none.

        Raises:
            ApiError: too much waits, or nothing here reads texts.
        """
        embedder = self.champion.embedder
        if embedder is None:
            raise ApiError(404, "no_encoder", f"{self.champion.event.bundle} makes no vectors of texts")
        queue, loop = self.queue(language), asyncio.get_running_loop()
        cut = await loop.run_in_executor(_CUTTERS, embedder.cut, texts)
        step = routing.step(wanted, self.champion.adapters) if wanted else routing.BASE
        try:
            found = await self._read(cut, queue, step.adapter)
        except Unloadable as error:
            log.error("%s without its adapter: %s", step.adapter, error)
            step = routing.BASE
            found = await self._read(cut, queue, None)
        return np.stack(found), sum(len(tokens) for tokens in cut), step

    async def written(self, question: str, source: Source) -> str | None:
        """An answer in the writer's words; None: there is no writer of the source's language, or none that holds."""
        if self.writing is None or source.language.partition("-")[0] not in self.champion.writes:
            return None
        return await self.writing.answer(question, source)

    async def translated(self, text: str, source: str, target: str) -> str | None:
        """A text in another language; None: it is in this one, or there is no translator that is good enough."""
        if self.legs is None:
            return None
        return await translating.answer(self.legs, self.champion.report, text, source, target, self.settings)

    async def _read(self, cut: Sequence[list[int]], queue: str, adapter: str | None) -> list[np.ndarray]:
        if adapter is None:
            return await self.batcher.submit(queue, [Cut(tokens, None) for tokens in cut])
        async with self.adapters.held(adapter):
            return await self.batcher.submit(queue, [Cut(tokens, adapter) for tokens in cut])


def _warmed(champion: Champion, tag: str) -> bool:
    """Whether an adapter is loaded before anybody asks for it."""
    try:
        champion.load(tag)
    except Exception as error:  # whatever it is, the model without it serves
        why = error if isinstance(error, ConfigError | RunError) else type(error).__name__
        log.error("the adapter %s is not there yet: %s", tag, why)
        return False
    return True
