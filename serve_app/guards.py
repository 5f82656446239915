"""What every request passes before a route sees it: an id, a key, and a body of a bearable size."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlray.config import Serving
from serve_app import errors, metrics
from serve_app.errors import ApiError
from serve_app.keys import Keys

OPEN = ("/healthz", "/readyz", "/")
"""Routes without a key: health, and the page, which holds nothing and asks for one itself."""
_PROXIED = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host")
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_DIGITS = 18
"""Of a length; Python reads no number of thousands."""


class Guards:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, settings: Serving, keys: Callable[[], Keys | None], *, names_requests: bool
    ) -> None:
        self._app, self._settings, self._keys, self._names = app, settings, keys, names_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._other(scope, receive, send)
            return
        headers = dict(scope["headers"])
        named = headers.get(b"x-request-id", b"")
        request_id = named.decode() if _ID.fullmatch(named) else secrets.token_hex(8)
        scope.setdefault("state", {})["id"] = request_id
        begin, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named_by_us = [(b"x-request-id", request_id.encode())] if self._names else []
                message["headers"] = [*message.get("headers", []), *named_by_us]
            await send(message)

        try:
            await self._app(scope, await self._admitted(scope, headers, receive), answer)
        except Exception as error:
            # Told here and to nobody else: a message may quote a customer.
            told = error if isinstance(error, ApiError) else errors.failure(error, f"request {request_id}")
            if status:  # half of the answer is out
                with contextlib.suppress(Exception):
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                await errors.answer(told, request_id)(scope, receive, answer)
        finally:
            metrics.told(scope, status, time.perf_counter() - begin)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there is none
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _admitted(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """What gives the body of a request that may pass; of an open route nobody reads one.

        Raises:
            ApiError: it may not.
        """
        named = headers.get(b"x-request-id")
        if named and not _ID.fullmatch(named):
            raise ApiError(
                400, "bad_request_id", "x-request-id has 64 letters, digits, dots and dashes at most"
            )
        if self._check(scope, headers):
            return _nothing
        return _replayed(await self._read(headers, receive), receive)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        """Whether a route is open; who asks for another one has a key, or is on this machine where there are none.

        Raises:
            ApiError: 401.
        """
        scope["state"]["writes"] = False
        if scope["path"].removeprefix(scope.get("root_path", "")) in OPEN:
            return True
        keys = self._keys()
        if keys is not None:
            key = keys.check(headers.get(b"authorization", b"").decode("latin-1"))
            scope["state"]["writes"] = key.writes
        elif not is_local((scope.get("client") or ("",))[0]) or not _here(headers):
            raise ApiError(
                401, "no_keys", "without API keys (serving.keys_uri) only this machine is answered"
            )
        else:
            scope["state"]["writes"] = True
        return False

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> list[Message]:
        try:
            return await asyncio.wait_for(self._body(headers, receive), self._settings.timeout_s)
        except TimeoutError:
            raise ApiError(408, "slow_body", "the body of the request did not come in time") from None

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> list[Message]:
        """The messages of the body, read before anything works on it.

        Raises:
            ApiError: 413, as soon as it is too large.
        """
        limit, size, messages = self._settings.max_body_bytes, 0, list[Message]()
        told = headers.get(b"content-length", b"0")
        if not told.isdigit() or len(told) > _DIGITS or int(told) > limit:
            raise _too_large(limit)
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(limit)
            if message["type"] != "http.request" or not message.get("more_body"):
                return messages


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"a request has {limit:,} bytes at most")


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    waiting = iter(messages)

    async def replay() -> Message:
        return next(waiting, None) or await receive()

    return replay


def is_local(host: str) -> bool:
    """Whether a name or address is that of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _here(headers: dict[bytes, bytes]) -> bool:
    """Whether a request was meant for this machine: by name, from no other page, and through no proxy."""
    if any(name in headers for name in _PROXIED):
        return False
    try:
        host = urlsplit("//" + headers.get(b"host", b"").decode("latin-1")).hostname
        origin = urlsplit(headers.get(b"origin", b"").decode("latin-1")).hostname
    except ValueError:  # no address
        return False
    if origin is None and b"origin" in headers:  # a page in a frame without a name
        return False
    return all(name is None or is_local(name) for name in (origin, host))


async def _nothing() -> Message:
    """The body of a request whose body nobody reads."""
    return {"type": "http.request", "body": b"", "more_body": False}
