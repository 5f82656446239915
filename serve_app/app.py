"""The application on Ray Serve: an ingress that speaks HTTP, and models behind it.

serve deploy serve_app/config.yaml      on a cluster
python -m serve_app key=value ...       on this machine
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import grpc
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from mlray import configuration, languages
from mlray.config import ConfigError, RunConfig, Serving
from mlray.release.changes import Product
from serve_app import api, errors, front, metrics, routing
from serve_app.door import Door
from serve_app.errors import ApiError
from serve_app.keys import Keys
from serve_app.models import Asked, Models
from serve_app.support import Source, looked_at
from serve_app.together import Together, UnansweredError, answered_soon

log = logging.getLogger("mlray.serve")

_ONGOING, _QUEUED = 1000, 1000
"""Requests of a replica at a time, which the batcher puts together, and those that wait in front of all of them."""
_FRESH_S = 1.0
"""For which an answer about readiness is good."""
_SHORT, _CALLS = ("search", "embed", "recommend"), 2
"""What is asked together, and such calls to a replica at a time."""
_FEW = 8
"""Texts of a request that is short."""
_ASKED = ("search", "embed", "recommend", "translate", "support", "write")
_CHANGING = {"upsert", "delete"}
"""What is not asked for a second time."""


class Replica:
    """The models in a process of their own; a refusal is an answer, so that Serve does not log it as a failure."""

    def __init__(self, config: RunConfig) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # short texts, and cores that are busy
        self._models, self._timeout_s = Models(config), config.serving.timeout_s

    async def ask(self, what: str, *told: Any) -> Any:
        """Calls `Models.<what>`; who asks has gone when the time is over, and what still waits is not run."""
        try:
            return await errors.in_time(getattr(self._models, what)(*told), self._timeout_s)
        except ApiError as refusal:
            return refusal
        except Exception as error:
            return errors.failure(error, what)

    async def ask_all(self, asked: list[tuple[Any, ...]]) -> list[Any]:
        """`ask` of several at a time; None for what is to be asked alone, as it takes long."""
        return await answered_soon([self.ask(*one) for one in asked])


class Behind:
    """`api.Backend` by a handle of the replicas; what customers ask stands in line by language (see `Door`)."""

    def __init__(self, replicas: DeploymentHandle, settings: Serving) -> None:
        self._replicas, self._watch_s = replicas, settings.watch_s
        # By the port that a replica has for others, and not as a task of an actor, which goes through four threads.
        self._shared = replicas.options(method_name="ask_all", _by_reference=False)
        # One each: a translation takes many times as long as a vector.
        self._doors = {what: Door.of(settings, short=what in _SHORT) for what in _ASKED}
        calls = _CALLS * settings.num_replicas
        self._together = {what: Together[tuple[Any, ...], Any](self._all, calls) for what in _SHORT}
        self._known, self._markets = frozenset[str](), frozenset[str]()
        self._looked = -math.inf
        self._look: asyncio.Task[None] | None = None
        self._ready: asyncio.Task[Any] | None = None
        self._asked = -math.inf

    async def search(self, query: str, market: str, k: int, asked: Asked) -> dict[str, Any]:
        """See `Models.search`."""
        return await self._in_line("search", _tag(query, asked), query, market, k, asked)

    async def embed(
        self, texts: list[str], asked: Asked, model: str | None, dimensions: int | None
    ) -> dict[str, Any]:
        """See `Models.embed`."""
        return await self._in_line("embed", _tag(texts[0], asked), texts, asked, model, dimensions)

    async def recommend(
        self, market: str, products: list[str], k: int, query: str = "", customer: str | None = None
    ) -> dict[str, Any]:
        """See `Models.recommend`."""
        return await self._in_line("recommend", market, market, products, k, query, customer)

    async def translate(
        self, texts: list[str], target: str, glossary: dict[str, str], names: list[str], asked: Asked
    ) -> dict[str, Any]:
        """See `Models.translate`."""
        tag = _tag(" ".join(texts), asked)
        return await self._in_line("translate", tag, texts, target, glossary, names, asked)

    async def support(self, messages: list[str], k: int, asked: Asked, write: bool = False) -> dict[str, Any]:
        """See `Models.support`."""
        last, *earlier = looked_at(messages)
        tag = _tag(last, asked, *earlier)
        return await self._in_line("support", tag, messages, k, asked, write)

    async def write(self, question: str, source: Source, bundle: str) -> dict[str, Any]:
        """See `Models.write`."""
        return await self._in_line("write", source.language, question, source, bundle)

    async def upsert(self, products: list[Product]) -> dict[str, Any]:
        """See `Models.upsert`."""
        found: dict[str, Any] = await self._ask("upsert", products)
        return found

    async def delete(self, products: list[tuple[str, str]]) -> dict[str, Any]:
        """See `Models.delete`."""
        found: dict[str, Any] = await self._ask("delete", products)
        return found

    async def about(self) -> dict[str, Any]:
        """See `Models.about`."""
        found: dict[str, Any] = await self._ask("about")
        metrics.seen(found)
        return found

    async def ready(self) -> str | None:
        """See `Models.ready`; what was told `_FRESH_S` ago at most, however many strangers ask."""
        if self._ready is None or time.monotonic() > self._asked + _FRESH_S:
            # In no request's context: it does not end with the request of whoever asks first.
            asking = asyncio.create_task(self._ask("ready"), context=contextvars.Context())
            self._asked, self._ready = time.monotonic(), asking
        bundle: str | None = await asyncio.shield(self._ready)
        return bundle

    async def _in_line(self, what: str, tag: str, *told: Any) -> dict[str, Any]:
        """As `_ask`, when it is the language's turn; what the champion does not know has one line together."""
        known, door, primary = self._lines(), self._doors[what], tag.partition("-")[0]
        line = primary if primary in known else languages.UNKNOWN
        if what == "recommend" and tag in self._markets:  # `shop-uk` and `shop-ca` are no dialects of `shop`
            line = tag
        await door.enter(line)
        asking = asyncio.create_task(self._ask(what, *told))

        def over(_: object) -> None:
            door.leave(line)
            if not asking.cancelled():
                asking.exception()  # taken, also where nobody waits for it any more

        asking.add_done_callback(over)
        # What a client that goes has asked alone ends; what goes with others is answered, and keeps its place.
        found: dict[str, Any] = await (asyncio.shield(asking) if _short(what, told) else asking)
        return found

    def _lines(self) -> frozenset[str]:
        """Languages and markets of the champion, as far as they are known; nobody waits for a new look."""
        if time.monotonic() > self._looked + self._watch_s:
            self._looked = time.monotonic()
            self._look = asyncio.create_task(self._learn(), context=contextvars.Context())
        return self._known

    async def _learn(self) -> None:
        with contextlib.suppress(ApiError):  # those of before will do
            champion = (await self.about())["champion"] or {}
            self._markets = frozenset([*champion.get("recommends", ()), *champion.get("markets", ())])
            tags = self._markets.union(champion.get("languages", ()))
            self._known = frozenset(tag.partition("-")[0] for tag in tags)

    async def _all(self, asked: list[tuple[Any, ...]]) -> list[Any]:
        found: list[Any] = await self._shared.remote(asked)
        return found

    async def _sent(self, what: str, *told: Any) -> Any:
        """What a replica has answered, in a call with others or alone."""
        if _short(what, told):
            with contextlib.suppress(grpc.RpcError):  # such as answers that are too long for a message
                found = await self._together[what].ask((what, *told))
                if found is not None:
                    return found
        return await self._replicas.ask.remote(what, *told)

    async def _ask(self, what: str, *told: Any) -> Any:
        """The answer of a replica; of another one, if the first is lost or serves nothing, and asking changes nothing.

        Raises:
            ApiError: it refuses, or none is there.
        """
        for left in range(0 if what in _CHANGING else 1, -1, -1):
            try:
                found = await self._sent(what, *told)
            except BackPressureError:
                raise ApiError(503, "overloaded", "too many requests wait; try again later", 1.0) from None
            except (RayError, RayServeException, UnansweredError) as error:
                if left:
                    continue
                log.error("%s: no replica has answered: %s", what, type(error).__name__)
                break
            if isinstance(found, ApiError):
                if found.code == "no_champion" and left:
                    continue
                raise found
            return found
        raise ApiError(503, "unavailable", "the models are not there; try again later", 1.0)


def _short(what: str, told: tuple[Any, ...]) -> bool:
    """Whether a request goes with others: what takes long goes alone."""
    return what in _SHORT and (what != "embed" or len(told[0]) <= _FEW)


def _tag(text: str, asked: Asked, *earlier: str) -> str:
    """The language in whose line a request waits."""
    try:
        spoken = routing.spoken(
            text, *earlier, declared=asked.language, header=asked.header, default=languages.UNKNOWN
        )
        return spoken.language
    except routing.UnknownLanguageError:  # which a replica will tell
        return languages.UNKNOWN


@serve.ingress()
class Ingress:
    """Speaks HTTP, and holds no model."""

    def __init__(self, config: RunConfig, models: DeploymentHandle) -> None:
        self._config, self._models = config, models
        routing.detect("warm")
        self._keys = self._read()
        if self._keys is None and not front.tells_strangers():
            raise ConfigError(
                "behind this HAProxy other machines look like this one; set serving.keys_uri, or start Ray with "
                "the settings of `python -m serve_app.front`"
            )
        if self._keys is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve when the replica begins."""
        return api.create(
            Behind(self._models, self._config.serving),
            self._config.serving,
            lambda: self._keys,
            names_requests=False,
        )

    def _read(self) -> Keys | None:
        uri = self._config.serving.keys_uri
        return Keys.read(uri, self._config.storage) if uri else None

    def _watch(self) -> None:
        """New keys count, and revoked ones do not, without a restart."""
        while True:
            time.sleep(self._config.serving.watch_s)
            try:
                self._keys = self._read()
            except Exception as error:  # a storage that is away for a moment locks nobody out
                log.error("the keys stay as they were: %s", type(error).__name__)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a configuration: `args` are keys of `mlray/config.py`, such as `release.registry_uri`."""
    config = configuration.change(RunConfig(), dict(args))
    return bind(config)


def bind(config: RunConfig) -> serve.Application:
    """The application of a configuration."""
    settings = config.serving
    models = serve.deployment(
        Replica,
        name="Models",
        num_replicas=settings.num_replicas,
        max_ongoing_requests=_ONGOING,
        max_queued_requests=_QUEUED,
        logging_config={"enable_access_log": False},  # the ingress tells of each request
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    )
    ingress = serve.deployment(
        Ingress, name="Ingress", max_ongoing_requests=_ONGOING, max_queued_requests=_QUEUED
    )
    return ingress.bind(config, models.bind(config))
