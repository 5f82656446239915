"""An answer of customer service as server-sent events: what is known comes before what has to be written."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from serve_app.errors import ApiError
from serve_app.schemas import SupportReply

MEDIA_TYPE = "text/event-stream"
_SENTENCE = re.compile(r".+?(?:[.!?。！？؟।]+\s*|$)", re.DOTALL)


async def of(told: SupportReply, written: Callable[[], Awaitable[str | None]] | None) -> AsyncIterator[str]:
    """`sources` before anything is written, `answer` sentence by sentence, and `done` with the rest.

    Args:
        told: the reply in the words of its source.
        written: gives the answer in the words of a writer, if it has one; None: nobody wants that.
    """
    yield _event("sources", {"sources": [one.model_dump() for one in told.sources]})
    if written:
        with contextlib.suppress(ApiError):  # then the source answers as it is
            if answer := await written():
                told = told.model_copy(update={"answer": answer, "written": True})
    for part in _SENTENCE.findall(told.answer or ""):
        yield _event("answer", {"text": part})
    yield _event("done", told.model_dump(exclude={"sources"}))


def _event(name: str, told: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(told, ensure_ascii=False)}\n\n"
