"""What a request is refused with: a status, a code for machines and a sentence for people, never a stack trace."""

from __future__ import annotations

import asyncio
import logging
import secrets
import traceback
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve_app.schemas import MANY

log = logging.getLogger("mlray.serve")

Answer = TypeVar("Answer")

_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
_INTERNAL = "internal"
_LISTED, _SHOWN = 3, 40
"""Faults of a request that are told, and characters of a field's name."""


class ApiError(Exception):
    """A refusal; it may cross from a replica to the ingress."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(status, code, message, retry_after_s)
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s


def answer(error: ApiError, request_id: str) -> JSONResponse:
    """The reply to a request that is refused."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    body = {"code": error.code, "message": error.message, "type": kind, "request_id": request_id}
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"error": body}, error.status, headers)


async def in_time(answer: Awaitable[Answer], timeout_s: float) -> Answer:
    """The answer, if it comes in time; else it is given up.

    Raises:
        ApiError: 503.
    """
    try:
        return await asyncio.wait_for(answer, timeout_s)
    except TimeoutError:
        raise ApiError(503, "deadline", "no answer in time; try again later", 1.0) from None


def failure(error: Exception, asked: str) -> ApiError:
    """What is told of a fault of ours. The log has where it was, without its message, which may quote a customer."""
    frames, name = "".join(traceback.format_tb(error.__traceback__)), secrets.token_hex(4)
    log.error("fault %s: %s failed with %s:\n%s", name, asked, type(error).__name__, frames)
    return ApiError(500, _INTERNAL, f"the server failed; its log has fault {name}")


def install(app: FastAPI) -> None:
    """Makes every refusal of an application one of ours."""
    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        ApiError: _refused,
        RequestValidationError: _invalid,
        HTTPException: _http,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.code == _INTERNAL:
        log.error("request %s: %s", request.state.id, error.message)
    return answer(error, request.state.id)


async def _invalid(request: Request, error: Exception) -> Response:
    """Where it is wrong and why, without what was sent."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    faults = [
        f"{'.'.join(str(part)[:_SHOWN] for part in fault['loc'] if part != 'body') or 'the body'}: {fault['msg']}"
        for fault in found[:_LISTED]
    ]
    kinds = {fault["type"] for fault in found}
    if "json_invalid" in kinds:
        refusal = ApiError(400, "invalid_json", "; ".join(faults))
    elif any(fault.get("ctx", {}).get("max_length") == MANY for fault in found):
        refusal = ApiError(413, "too_many_texts", "so many texts are not looked at; send them in parts")
    else:
        refusal = ApiError(422, "invalid_request", "; ".join(faults))
    return answer(refusal, request.state.id)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "error")
    return answer(ApiError(error.status_code, code, f"{error.detail}"), request.state.id)
