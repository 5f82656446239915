"""What a request may take: time, and the number and length of its texts."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Any

from fastapi import Request

from mlray.config import Serving
from serve_app import errors, metrics
from serve_app.backend import Backend
from serve_app.errors import ApiError


class Limits:
    """The backend within the limits of a request."""

    def __init__(self, backend: Backend, settings: Serving) -> None:
        self.backend, self.settings = backend, settings

    async def within(self, answer: Awaitable[dict[str, Any]], http: Request | None = None) -> dict[str, Any]:
        """The answer, if it comes in time; that to `http` is counted by what has served it.

        Raises:
            ApiError: it does not.
        """
        begin = time.perf_counter()
        found = await errors.in_time(answer, self.settings.timeout_s)
        if http:
            metrics.answered(http.scope, found["served_by"], time.perf_counter() - begin)
        return found

    def check(self, texts: list[str]) -> None:
        """
        Raises:
            ApiError: there are too many, or one is too long.
        """
        if len(texts) > self.settings.max_texts:
            raise ApiError(
                413,
                "too_many_texts",
                f"{len(texts):,} texts; a request has {self.settings.max_texts:,} at most",
            )
        longest = max(map(len, texts))
        if longest > self.settings.max_chars:
            raise ApiError(
                413,
                "text_too_long",
                f"{longest:,} characters; a text has {self.settings.max_chars:,} at most",
            )
