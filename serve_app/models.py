"""The models behind the API: one champion at a time, exchanged as a whole; nothing here knows of Ray Serve or HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mlray.access import StorageError
from mlray.config import RunConfig
from mlray.release.changes import Change, Product
from serve_app import recommending, routing, support, translating
from serve_app.batching import WRITTEN
from serve_app.catalogue import Catalogue, apart
from serve_app.errors import ApiError
from serve_app.reading import Reading
from serve_app.support import Source
from serve_app.watch import Watch

_CHANGES = 64
"""Changes of products that may wait in a replica."""
_AGAIN_S = 5.0
"""After which a change may be asked for again."""


@dataclass(frozen=True)
class Asked:
    """What a request says of its language, and of who asks."""

    language: str | None = None
    header: str | None = None
    customer: str | None = None
    """Who asks, by a hash: the same customer gets the same model."""


class Models:
    """Answers with the champion of the registry, and looks for another every `serving.watch_s`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.watch = Watch(config)
        # A change is not written behind the reading of another.
        self._writing, self._taking = (ThreadPoolExecutor(1, thread_name_prefix="change") for _ in range(2))
        self._changes = 0
        self.watch.begin()

    async def ready(self) -> str | None:
        """The bundle that serves; None: there is none yet."""
        now = self.watch.slot.now
        return now.champion.event.bundle if now else None

    async def about(self) -> dict[str, Any]:
        """The champion, the challenger, and why another was not taken up; of what is known, without a look."""
        now = self.watch.slot.now
        return {
            "champion": now.champion.about() if now else None,
            "challenger": self.watch.challenger,
            "fault": self.watch.fault,
        }

    async def embed(
        self, texts: list[str], asked: Asked, model: str | None, dimensions: int | None
    ) -> dict[str, Any]:
        """Unit vectors (N, H) float32 of texts, the tokens read, and what has served.

        Raises:
            ApiError: no champion, another model is asked for, more dimensions than there are, or the queue is full.
        """
        now = self._ready()
        if model not in {None, "champion", now.champion.event.bundle}:
            raise ApiError(
                404, "unknown_model", f"there is no such model; {now.champion.event.bundle} serves"
            )
        spoken = self._spoken(asked, now, texts[0])
        # Only who declares a language gets its adapter: vectors of two adapters do not lie in one space.
        wanted = spoken.language if spoken.known_by == "declared" else None
        vectors_NH, tokens, step = await now.vectors(texts, spoken.language, wanted)
        if dimensions is not None:
            if dimensions > vectors_NH.shape[1]:
                raise ApiError(422, "invalid_request", f"dimensions: the model makes {vectors_NH.shape[1]}")
            vectors_NH = vectors_NH[:, :dimensions]
            vectors_NH = vectors_NH / np.maximum(np.linalg.norm(vectors_NH, axis=1, keepdims=True), 1e-12)
        return {"vectors": vectors_NH, "tokens": tokens, "served_by": _served_by(now, spoken, step)}

    async def search(self, query: str, market: str, k: int, asked: Asked) -> dict[str, Any]:
        """The k products of a market that are nearest to a query, and what has served.

        Raises:
            ApiError: no champion, no index, no such market, or the queue is full.
        """
        now = self._ready()
        now.selling(market)  # what the champion refuses, a challenger does not answer
        spoken = self._spoken(asked, now, query)

        async def ask(reading: Reading) -> dict[str, Any]:
            catalogue = reading.selling(market)
            vectors_1H, _, step = await reading.vectors([query], spoken.language, market)
            found = await apart(catalogue.search, market, vectors_1H[0], k, step.adapter is None)
            results = [{"id": name, "score": score, "title": title} for name, score, title in found]
            return {"results": results, "served_by": _served_by(reading, spoken, step)}

        return await self.watch.trials.answer(now, ask, f"search {market}", asked.customer)

    async def recommend(
        self, market: str, products: list[str], k: int, query: str = "", customer: str | None = None
    ) -> dict[str, Any]:
        """The k products of a market that may follow in a session, with what was searched for; and what has served.

        Raises:
            ApiError: no champion, no index, no such market, no known product, or the queue is full.
        """
        now = self._ready()
        now.selling(market)
        session = recommending.Session(tuple(products), market, query)

        async def ask(reading: Reading) -> dict[str, Any]:
            near_by: recommending.By = "texts" if reading.champion.embedder else "items"
            catalogue, event = reading.selling(market), reading.champion.event
            found = await recommending.recommend(catalogue, reading.sessions, session, k, near_by)
            return {
                "results": [asdict(one) for one in found.products],
                "unknown": found.unknown,
                "served_by": {"bundle": event.bundle, "index": event.index, **asdict(found.step)},
            }

        return await self.watch.trials.answer(now, ask, f"recommend {market}", customer)

    async def translate(
        self, texts: list[str], target: str, glossary: dict[str, str], names: list[str], asked: Asked
    ) -> dict[str, Any]:
        """Texts in another language, in which the words of a glossary, names, numbers and addresses stand as they must.

        Raises:
            ApiError: no champion, no translator, no way between the languages, or the queue is full.
        """
        now = self._ready()
        legs = now.held(now.legs, "no_translator", "a translator")
        spoken = self._spoken(asked, now, " ".join(texts))  # the first may be a size
        path = translating.choose(now.champion.report, spoken.language, target, self._config.serving)
        found = await translating.translate(legs, texts, path, glossary, names)
        step = routing.Step(path.step, None)
        told = {"translations": [asdict(one) for one in found], "way": list(path.languages)}
        return {**told, "quality": path.quality, "served_by": _served_by(now, spoken, step)}

    async def support(self, messages: list[str], k: int, asked: Asked, write: bool = False) -> dict[str, Any]:
        """The answer to a customer, with its sources; none where no source is sure enough.

        One that was found in another language is translated, if the bundle was judged good enough at that.

        Args:
            messages: of the customer, the last one last.
            k: sources, at most.
            asked: what the request says of its language.
            write: in the words of the bundle's writer, if it was judged in the language and the source bears it out.

        Raises:
            ApiError: no champion, no knowledge, or the queue is full.
        """
        now, read_by = self._ready(), dict[str, Reading]()
        now.answers()
        spoken = self._spoken(asked, now, *support.looked_at(messages))

        async def ask(reading: Reading) -> dict[str, Any]:
            read_by[reading.champion.event.bundle] = reading
            knowledge, confidence = reading.answers(), self._config.serving.confidence
            vectors_MH, _, step = await reading.vectors(support.looked_at(messages), spoken.language, None)
            question_H = support.question(vectors_MH)
            found = await apart(support.find, knowledge, question_H, spoken.language, k, confidence)
            served_by = _served_by(reading, spoken, step) | {"index": reading.champion.event.knowledge}
            return {**support.reply(found, confidence), "served_by": served_by}

        place = f"support {now.queue(spoken.language)}"
        told = await self.watch.trials.answer(now, ask, place, asked.customer)
        if told["answer"] is None:
            return told
        reading = read_by[told["served_by"]["bundle"]]
        with contextlib.suppress(TimeoutError):  # then the source answers as it is
            async with asyncio.timeout(self._config.serving.timeout_s * WRITTEN):
                if translated := await reading.translated(told["answer"], told["language"], spoken.language):
                    return told | {"answer": translated, "language": spoken.language, "translated": True}
                if write and (written := await reading.written(messages[-1], Source(**told["sources"][0]))):
                    return told | {"answer": written, "written": True}
        return told

    async def write(self, question: str, source: Source, bundle: str) -> dict[str, Any]:
        """`answer` from a source of `support` in the words of the bundle's writer, as there; None: it has none.

        Args:
            question: of the customer.
            source: the best of what was found.
            bundle: that has found it; another one may serve by now.

        Raises:
            ApiError: no champion.
        """
        now = self._ready()
        same = now if now.champion.event.bundle == bundle else self.watch.trials.reading(bundle)
        return {"answer": await same.written(question, source) if same else None}

    async def upsert(self, products: list[Product]) -> dict[str, Any]:
        """Adds products to their markets or exchanges their texts, here soon, and wherever this index is served.

        Raises:
            ApiError: no champion, no index, or storage failed.
        """
        return {**await self._change(self._ready(), Change(upsert=tuple(products))), "unknown": []}

    async def delete(self, products: list[tuple[str, str]]) -> dict[str, Any]:
        """Takes products (market, id) out of their markets; those that are not there are named.

        Raises:
            ApiError: no champion, no index, none of them is there, or storage failed.
        """
        now = self._ready()
        catalogue = self._changing(now)
        with _stored():
            unknown = await asyncio.get_running_loop().run_in_executor(
                self._writing, catalogue.missing, products
            )
        if len(unknown) == len(products):
            raise ApiError(404, "unknown_product", "none of these products is in its market")
        known = tuple(one for one in products if one not in unknown)
        return {**await self._change(now, Change(delete=known)), "unknown": unknown}

    def _changing(self, now: Reading) -> Catalogue:
        """The products that are changed, if there is room for one more change."""
        if self._changes >= _CHANGES:
            raise ApiError(429, "overloaded", "too many changes wait; try again later", _AGAIN_S)
        return now.products()

    async def _change(self, now: Reading, change: Change) -> dict[str, Any]:
        catalogue = self._changing(now)
        self._changes += 1
        # A client that goes, or for whom it takes too long, has changed the products all the same.
        changing = asyncio.create_task(self._write(catalogue, change))
        with _stored():
            number, taking = await asyncio.shield(changing)
        done, _ = await asyncio.wait([taking], timeout=self._config.serving.timeout_s / 2)
        event = now.champion.event
        taken_up = bool(done) and taking.exception() is None and taking.result()
        told = {"change": number, "products": len(change.upsert) + len(change.delete), "taken_up": taken_up}
        return {**told, "bundle": event.bundle, "index": event.index}

    async def _write(self, catalogue: Catalogue, change: Change) -> tuple[int, asyncio.Future[bool]]:
        """The number of a change that is written, and its taking up, which goes on."""
        loop = asyncio.get_running_loop()
        try:
            number = await loop.run_in_executor(self._writing, catalogue.write, change)
        except BaseException:
            self._changes -= 1
            raise
        taking = loop.run_in_executor(self._taking, catalogue.take_up, number)
        taking.add_done_callback(self._changed)
        return number, taking

    def _changed(self, _: object) -> None:
        self._changes -= 1

    def _ready(self) -> Reading:
        if self.watch.slot.now is None:
            raise ApiError(503, "no_champion", "no model is served yet", self._config.serving.watch_s)
        return self.watch.slot.now

    def _spoken(self, asked: Asked, now: Reading, *texts: str) -> routing.Spoken:
        try:
            return routing.spoken(
                *texts,
                declared=asked.language,
                header=asked.header,
                among=now.champion.languages,
                default=self._config.serving.language,
            )
        except routing.UnknownLanguageError as error:
            raise ApiError(422, "unknown_language", f"language: {error}") from None


@contextlib.contextmanager
def _stored() -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise ApiError(503, "storage", "the change could not be written; try again later", _AGAIN_S) from None


def _served_by(now: Reading, spoken: routing.Spoken, step: routing.Step) -> dict[str, Any]:
    event = now.champion.event
    return {"bundle": event.bundle, "index": event.index, **asdict(spoken), **asdict(step)}
