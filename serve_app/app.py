"""The application on Ray Serve: an ingress that speaks HTTP, and models behind it.

serve deploy serve_app/config.yaml      on a cluster
python -m serve_app key=value ...       on this machine
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from mlray import configuration
from mlray.config import ConfigError, RunConfig, RunError
from mlray.release.changes import Product
from serve_app import api
from serve_app.keys import Keys
from serve_app.models import Asked, Models

log = logging.getLogger("mlray.serve")

_ONGOING = 1000
"""Requests of a replica at a time: the batcher puts them together, and refuses what is too much."""


class _Behind:
    """`api.Backend` by a handle of the deployment that holds the models."""

    def __init__(self, models: DeploymentHandle) -> None:
        self._models = models

    async def search(self, query: str, market: str, k: int, asked: Asked) -> dict[str, Any]:
        """See `Models.search`."""
        found: dict[str, Any] = await self._models.search.remote(query, market, k, asked)
        return found

    async def embed(
        self, texts: list[str], asked: Asked, model: str | None, dimensions: int | None
    ) -> dict[str, Any]:
        """See `Models.embed`."""
        found: dict[str, Any] = await self._models.embed.remote(texts, asked, model, dimensions)
        return found

    async def support(self, messages: list[str], k: int, asked: Asked) -> dict[str, Any]:
        """See `Models.support`."""
        found: dict[str, Any] = await self._models.support.remote(messages, k, asked)
        return found

    async def upsert(self, products: list[Product]) -> dict[str, Any]:
        """See `Models.upsert`."""
        found: dict[str, Any] = await self._models.upsert.remote(products)
        return found

    async def delete(self, products: list[tuple[str, str]]) -> dict[str, Any]:
        """See `Models.delete`."""
        found: dict[str, Any] = await self._models.delete.remote(products)
        return found

    async def about(self) -> dict[str, Any]:
        """See `Models.about`."""
        found: dict[str, Any] = await self._models.about.remote()
        return found


@serve.ingress()
class Ingress:
    """Speaks HTTP, and holds no model."""

    def __init__(self, config: RunConfig, models: DeploymentHandle) -> None:
        self._config, self._models = config, models
        self._keys = self._read()
        if self._keys is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve when the replica begins."""
        return api.create(_Behind(self._models), self._config.serving, lambda: self._keys)

    def _read(self) -> Keys | None:
        uri = self._config.serving.keys_uri
        return Keys.read(uri, self._config.storage) if uri else None

    def _watch(self) -> None:
        """New keys count, and revoked ones do not, without a restart."""
        while not threading.Event().wait(self._config.serving.watch_s):
            try:
                self._keys = self._read()
            except (ConfigError, RunError) as error:
                log.error("the keys stay as they were: %s", error)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a configuration: `args` are keys of `mlray/config.py`, such as `release.registry_uri`."""
    config = configuration.change(RunConfig(), dict(args))
    return bind(config)


def bind(config: RunConfig) -> serve.Application:
    """The application of a configuration."""
    settings = config.serving
    models = serve.deployment(
        Models,
        num_replicas=settings.num_replicas,
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
    )
    ingress = serve.deployment(Ingress, name="Ingress", max_ongoing_requests=_ONGOING)
    return ingress.bind(config, models.bind(config))
