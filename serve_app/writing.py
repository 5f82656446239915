"""Answers that a model writes from a passage of the shop's own knowledge, and what keeps it to that.

An answer counts only if every number, address and whatever holds a digit or a dot in it stands in the passage, and
enough of its words do. The customer's own words and numbers do not count: nobody makes the shop repeat a claim. If not,
or if there is no time for it, the passage is told as it is.
"""

from __future__ import annotations

import asyncio
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mlray import languages
from mlray.config import Serving
from mlray.release.companions import Composer
from serve_app.batching import WRITTEN, Batcher, Overloaded
from serve_app.protection import Protector
from serve_app.support import Source
from serve_app.translating import PER_TOKEN

log = logging.getLogger("mlray.serve")

_DOTTED = re.compile(r"\w{2,64}(?:\.\w{2,64})+")
_WORKERS = ThreadPoolExecutor(2, thread_name_prefix="write")
"""Take texts apart; nothing else may keep them busy."""


@dataclass(frozen=True)
class Prompt:
    """A question with a passage."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Writing:
    """A writer, and what waits for it."""

    model: Composer
    batcher: Batcher[Prompt, str]
    grounded: float
    patience_s: float

    @classmethod
    def of(cls, model: Composer, settings: Serving) -> Writing:
        """Answers to many customers in one call of the model."""
        patience_s = settings.timeout_s * WRITTEN
        batcher = Batcher[Prompt, str](
            lambda batch: model.write([one.text for one in batch]),
            lambda one: one.tokens + model.longest * PER_TOKEN,
            budget=settings.batch_tokens * PER_TOKEN // 4,
            capacity=settings.queued_tokens * PER_TOKEN // 4,
            patience_s=patience_s,
        )
        return cls(model, batcher, settings.grounded, patience_s)

    async def answer(self, question: str, source: Source) -> str | None:
        """An answer to a question from a source; None: there is none that it bears out, or something failed."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.patience_s):
                found = await loop.run_in_executor(_WORKERS, self.model.prompt, question, source.text)
                if found is None:
                    return None
                (written,) = await self.batcher.submit(source.language, [Prompt(*found)])
                told = (written, source.text, self.grounded)
                return written if await loop.run_in_executor(_WORKERS, borne_out, *told) else None
        except (Overloaded, TimeoutError):
            return None
        except Exception as error:  # the passage is there whatever a model does
            log.error("an answer could not be written: %s", type(error).__name__)
            return None


def borne_out(answer: str, passage: str, least: float) -> bool:
    """Whether an answer says what its passage says, as far as numbers, addresses and words tell.

    Args:
        answer: as it was written.
        passage: from which it was written.
        least: share of its words that must stand there.
    """
    words, known = languages.words(answer), set(languages.words(passage))
    shared = sum(word in known for word in words)
    return bool(words) and _kept(answer) <= _kept(passage) and shared >= least * len(words)


def _kept(text: str) -> set[str]:
    """What must not be invented, whatever space is in it: what holds a digit, addresses, names with a dot inside."""
    return {
        "".join(one.split()) for one in [*Protector([], {}, []).protect(text).kept, *_DOTTED.findall(text)]
    }
