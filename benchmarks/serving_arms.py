"""Servers of one encoder behind OpenAI's form of `/v1/embeddings`: `python serving_arms.py ARM WEIGHTS PORT`.

fastapi        FastAPI and uvicorn with sentence-transformers, one forward pass a request
stock-serve    the same class on Ray Serve, as its guide has it
serve-batch    Ray Serve with `@serve.batch`: up to 32 requests, 5 ms

Ours and infinity-emb are started by their own commands; see `serving.py`.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import torch
from fastapi import Body, FastAPI
from sentence_transformers import SentenceTransformer

_BATCH, _WAIT_S = 32, 0.005
BODY = Body()
"""Where Serve makes the routes, in a replica, an annotation alone is taken for a part of the address."""


def main() -> None:
    arm, weights, port = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    {"fastapi": fastapi, "stock-serve": stock_serve, "serve-batch": serve_batch}[arm](weights, int(port))


class Encoder:
    """The model, and its answers."""

    def __init__(self, weights: str) -> None:
        self._model = SentenceTransformer(weights, device="cpu")

    def embed(self, texts: list[str]) -> list[list[float]]:
        """Unit vectors."""
        found: list[list[float]] = self._model.encode(texts, normalize_embeddings=True).tolist()
        return found


def reply(vectors: list[list[float]]) -> dict[str, Any]:
    """As OpenAI's API has it."""
    return {"data": [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]}


def texts_of(body: dict[str, Any]) -> list[str]:
    """What is asked for."""
    asked = body["input"]
    return [asked] if isinstance(asked, str) else asked


def fastapi(weights: str, port: int) -> None:
    import uvicorn

    app, encoder = FastAPI(), Encoder(weights)

    @app.post("/v1/embeddings")
    def embeddings(body: dict[str, Any] = BODY) -> dict[str, Any]:
        return reply(encoder.embed(texts_of(body)))

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def stock_serve(weights: str, port: int) -> None:
    from ray import serve

    app = FastAPI()

    @serve.deployment(max_ongoing_requests=100)
    @serve.ingress(app)
    class Embeddings:
        def __init__(self) -> None:
            self._encoder = Encoder(weights)

        @app.post("/v1/embeddings")
        def embeddings(self, body: dict[str, Any] = BODY) -> dict[str, Any]:
            return reply(self._encoder.embed(texts_of(body)))

    _serve(Embeddings.bind(), port)


def serve_batch(weights: str, port: int) -> None:
    from ray import serve

    app = FastAPI()

    @serve.deployment(max_ongoing_requests=100)
    @serve.ingress(app)
    class Embeddings:
        def __init__(self) -> None:
            self._encoder = Encoder(weights)

        @serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=_WAIT_S)
        async def _batch(self, requests: list[list[str]]) -> list[list[list[float]]]:
            vectors = iter(self._encoder.embed([text for texts in requests for text in texts]))
            return [[next(vectors) for _ in texts] for texts in requests]

        @app.post("/v1/embeddings")
        async def embeddings(self, body: dict[str, Any] = BODY) -> dict[str, Any]:
            return reply(await self._batch(texts_of(body)))

    _serve(Embeddings.bind(), port)


def _serve(application: Any, port: int) -> None:
    import ray
    from ray import serve

    ray.init(num_cpus=2, logging_level="error", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(application, name="arm")
    threading.Event().wait()


if __name__ == "__main__":
    main()
