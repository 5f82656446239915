"""The routes, their guards, and nothing else: what models do is behind `Backend`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib import resources
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer

from mlray.config import Serving
from mlray.release.changes import Product
from serve_app import errors, events, metrics
from serve_app.backend import Backend
from serve_app.errors import ApiError
from serve_app.guards import Guards
from serve_app.keys import Keys
from serve_app.limits import Limits
from serve_app.models import Asked
from serve_app.schemas import (
    ChangeReply,
    DeleteRequest,
    Embedding,
    EmbeddingsReply,
    EmbeddingsRequest,
    ModelsReply,
    ProductsRequest,
    RecommendReply,
    RecommendRequest,
    Refusal,
    SearchReply,
    SearchRequest,
    SupportReply,
    SupportRequest,
    TranslateReply,
    TranslateRequest,
    Usage,
)
from serve_app.support import Source

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal} for status in (400, 401, 403, 404, 408, 413, 422, 429, 500, 503)
}
_EVENTS: dict[str, Any] = {
    "description": "the answer; with `stream` as events: `sources`, `answer` in parts, and `done` with the rest",
    "content": {events.MEDIA_TYPE: {"schema": {"type": "string"}}},
}
_PAGE = (resources.files("serve_app") / "console" / "index.html").read_text(encoding="utf-8")
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_KEY = HTTPBearer(auto_error=False, description="an API key; `Guards` asks for it where there are keys")
"""For OpenAPI alone."""
AcceptLanguage = Annotated[str | None, Header()]
CustomerId = Annotated[
    str | None,
    Header(alias="x-customer-id", max_length=128, description="whoever asks; only its hash is used"),
]


def create(
    backend: Backend, settings: Serving, keys: Callable[[], Keys | None], *, names_requests: bool = True
) -> FastAPI:
    """The application.

    Args:
        backend: what answers.
        settings: limits.
        keys: those that are good now; None: no key is asked for, and only this machine is answered.
        names_requests: whether replies carry `x-request-id`; not where the server in front adds it.
    """
    app = FastAPI(
        title="mlray",
        description="Search, recommendations, customer service and embeddings for shops in many languages, by the "
        "champion of the registry.",
        version="1",
        docs_url="/docs",
        redoc_url=None,
    )
    errors.install(app)
    limits = Limits(backend, settings)
    app.include_router(_open(limits))
    for router in (_products_for, _translation, _support, _models, _products):
        app.include_router(router(limits), prefix="/v1", responses=_REFUSALS, dependencies=[Depends(_KEY)])

    @app.get("/metrics", tags=["health"], dependencies=[Depends(_KEY)], response_class=PlainTextResponse)
    async def told() -> Response:
        """Of this process, for Prometheus."""
        return Response(metrics.text(), media_type=metrics.CONTENT_TYPE)

    app.add_middleware(Guards, settings=settings, keys=keys, names_requests=names_requests)
    return app


def _open(limits: Limits) -> APIRouter:
    """What needs no key."""
    router = APIRouter(tags=["health"])

    @router.get("/", include_in_schema=False)
    async def console() -> HTMLResponse:
        """A page to try it."""
        return HTMLResponse(_PAGE, headers=_PAGE_HEADERS)

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @router.get("/readyz", responses={503: {"model": Refusal}})
    async def readyz() -> dict[str, str]:
        """A champion serves."""
        bundle = await errors.in_time(limits.backend.ready(), limits.settings.timeout_s)
        if bundle is None:
            raise ApiError(503, "no_champion", "no model is served yet", 1.0)
        return {"status": "ok", "bundle": bundle}

    return router


def _products_for(limits: Limits) -> APIRouter:
    """What a customer may want."""
    router = APIRouter()

    @router.post("/search")
    async def search(
        request: SearchRequest,
        http: Request,
        accept_language: AcceptLanguage = None,
        customer: CustomerId = None,
    ) -> SearchReply:
        """Products of a market for a customer's words."""
        limits.check([request.query])
        asked = Asked(request.language, accept_language, _hashed(customer))
        found = limits.backend.search(request.query, request.market, request.k, asked)
        return SearchReply.model_validate(await limits.within(found, http))

    @router.post("/recommend")
    async def recommend(
        request: RecommendRequest, http: Request, customer: CustomerId = None
    ) -> RecommendReply:
        """Products of a market that a customer may want next."""
        limits.check([request.query or ""])
        told = (request.market, request.products, request.k, request.query or "", _hashed(customer))
        found = limits.backend.recommend(*told)
        return RecommendReply.model_validate(await limits.within(found, http))

    return router


def _models(limits: Limits) -> APIRouter:
    router = APIRouter()

    @router.post("/embeddings")
    async def embeddings(
        request: EmbeddingsRequest, http: Request, accept_language: AcceptLanguage = None
    ) -> EmbeddingsReply:
        """Vectors of texts, as OpenAI's API has them."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        limits.check(texts)
        asked = Asked(request.language, accept_language)
        answer = limits.backend.embed(texts, asked, request.model, request.dimensions)
        found = await limits.within(answer, http)
        vectors = [_encoded(row, request.encoding_format) for row in found["vectors"]]
        return EmbeddingsReply(
            data=[Embedding(index=i, embedding=vector) for i, vector in enumerate(vectors)],
            model=found["served_by"]["bundle"],
            usage=Usage(prompt_tokens=found["tokens"], total_tokens=found["tokens"]),
            served_by=found["served_by"],
        )

    @router.get("/models")
    async def models() -> ModelsReply:
        """Champion and challenger, and how each was judged per language."""
        about = await limits.within(limits.backend.about())
        found = [(role, about[role]) for role in ("champion", "challenger") if about[role]]
        data = [{"object": "model", "role": role, **one} for role, one in found]
        return ModelsReply(data=data, fault=about["fault"], latency=metrics.latency())

    return router


def _translation(limits: Limits) -> APIRouter:
    router = APIRouter()

    @router.post("/translate")
    async def translate(request: TranslateRequest, http: Request) -> TranslateReply:
        """Texts in another language; numbers, addresses, names and the words of a glossary stay as they must be."""
        limits.check(request.texts)
        asked = Asked(request.language)  # what a browser prefers is not the language of the texts
        told = (request.texts, request.target, request.glossary, request.names, asked)
        return TranslateReply.model_validate(await limits.within(limits.backend.translate(*told), http))

    return router


def _support(limits: Limits) -> APIRouter:
    router = APIRouter()

    @router.post("/support", response_model=SupportReply, responses={200: _EVENTS})
    async def support(
        request: SupportRequest,
        http: Request,
        accept_language: AcceptLanguage = None,
        customer: CustomerId = None,
    ) -> Any:
        """The answer of the shop's own knowledge to a customer, with its sources, or that a person is to take over."""
        limits.check([one.text for one in request.messages])
        messages = [one.text for one in request.messages if one.role == "user"]
        asked = Asked(request.language, accept_language, _hashed(customer))

        write = request.write and not request.stream  # as events it is written after the sources are told
        found = limits.backend.support(messages, request.k, asked, write)
        told = SupportReply.model_validate(await limits.within(found, http))
        if not request.stream:
            return told

        async def written() -> str | None:
            source = Source(**told.sources[0].model_dump())
            found = await limits.within(limits.backend.write(messages[-1], source, told.served_by.bundle))
            return str(found["answer"]) if found["answer"] else None

        wanted = written if request.write and told.answer and not told.translated else None
        return StreamingResponse(events.of(told, wanted), media_type=events.MEDIA_TYPE)

    return router


def _products(limits: Limits) -> APIRouter:
    router = APIRouter(prefix="/products", dependencies=[Depends(_writes)])

    @router.put("")
    async def upsert(request: ProductsRequest) -> ChangeReply:
        """Adds products to their markets, or exchanges their texts."""
        limits.check([one.text for one in request.products])
        products = [Product(**one.model_dump()) for one in request.products]
        return ChangeReply.model_validate(await limits.within(limits.backend.upsert(products)))

    @router.post("/delete")
    async def delete(request: DeleteRequest) -> ChangeReply:
        """Takes products out of their markets."""
        limits.check([one.id for one in request.products])
        products = [(one.market, one.id) for one in request.products]
        return ChangeReply.model_validate(await limits.within(limits.backend.delete(products)))

    return router


def _writes(request: Request) -> None:
    if not request.state.writes:
        raise ApiError(403, "read_only_key", "this API key may not change products")


def _hashed(customer: str | None) -> str | None:
    return hashlib.sha256(customer.encode()).hexdigest() if customer else None


def _encoded(vector_H: np.ndarray, how: str) -> list[float] | str:
    if how == "float":
        numbers: list[float] = vector_H.tolist()
        return numbers
    return base64.b64encode(np.ascontiguousarray(vector_H, "<f4").tobytes()).decode()
