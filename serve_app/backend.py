"""What the routes ask of the models, wherever these are."""

from __future__ import annotations

from typing import Any, Protocol

from mlray.release.changes import Product
from serve_app.models import Asked
from serve_app.support import Source


class Backend(Protocol):
    """What answers; see `models.Models`."""

    async def search(self, query: str, market: str, k: int, asked: Asked) -> dict[str, Any]:
        """`results` and `served_by`."""
        ...

    async def recommend(
        self, market: str, products: list[str], k: int, query: str = "", customer: str | None = None
    ) -> dict[str, Any]:
        """As `schemas.RecommendReply`."""
        ...

    async def translate(
        self, texts: list[str], target: str, glossary: dict[str, str], names: list[str], asked: Asked
    ) -> dict[str, Any]:
        """As `schemas.TranslateReply`."""
        ...

    async def support(self, messages: list[str], k: int, asked: Asked, write: bool = False) -> dict[str, Any]:
        """As `schemas.SupportReply`."""
        ...

    async def write(self, question: str, source: Source, bundle: str) -> dict[str, Any]:
        """`answer` in a writer's words."""
        ...

    async def embed(
        self, texts: list[str], asked: Asked, model: str | None, dimensions: int | None
    ) -> dict[str, Any]:
        """`vectors`, `tokens` and `served_by`."""
        ...

    async def ready(self) -> str | None:
        """The bundle that serves; None: there is none yet."""
        ...

    async def about(self) -> dict[str, Any]:
        """`champion` and `challenger`."""
        ...

    async def upsert(self, products: list[Product]) -> dict[str, Any]:
        """As `schemas.ChangeReply`."""
        ...

    async def delete(self, products: list[tuple[str, str]]) -> dict[str, Any]:
        """As `schemas.ChangeReply`."""
        ...
