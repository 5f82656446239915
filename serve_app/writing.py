"""Answers that a model writes from passages of the shop's own knowledge, and what keeps it to them.

An answer counts only if every number, address and code in it stands in a passage, and enough of its words do or are the
customer's. If not, or if there is no time for it, the nearest passage is told as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from mlray import languages
from mlray.config import Serving
from mlray.release.companions import Composer
from serve_app.batching import Batcher, Overloaded
from serve_app.protection import Protector
from serve_app.support import Source
from serve_app.translating import PER_TOKEN


@dataclass(frozen=True)
class Prompt:
    """A question with passages."""

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
        """Answers to many customers in one call of the model; half of a request's time is theirs."""
        patience_s = settings.timeout_s / 2
        batcher = Batcher[Prompt, str](
            lambda batch: model.write([one.text for one in batch]),
            lambda one: one.tokens + model.longest * PER_TOKEN,
            budget=settings.batch_tokens * PER_TOKEN // 4,
            capacity=settings.queued_tokens * PER_TOKEN // 4,
            patience_s=patience_s,
        )
        return cls(model, batcher, settings.grounded, patience_s)

    async def answer(self, question: str, sources: Sequence[Source]) -> str | None:
        """An answer to a question from sources, the surest first; None: there is none that they bear out."""
        passages = [one.text for one in sources]
        loop = asyncio.get_running_loop()
        if (found := await loop.run_in_executor(None, self.model.prompt, question, passages)) is None:
            return None
        try:
            async with asyncio.timeout(self.patience_s):
                (written,) = await self.batcher.submit(sources[0].language, [Prompt(*found)])
        except (Overloaded, TimeoutError):
            return None
        return written if borne_out(written, question, passages, self.grounded) else None


def borne_out(answer: str, question: str, passages: Sequence[str], least: float) -> bool:
    """Whether an answer says what its passages say, as far as numbers, codes, addresses and words tell.

    Args:
        answer: as it was written.
        question: whose words, but not whose numbers, count as well.
        passages: from which it was written.
        least: share of its words that must be known.
    """
    words = languages.words(answer)
    known = {word for text in (question, *passages) for word in languages.words(text)}
    told = {word for text in passages for word in _kept(text)}
    shared = sum(word in known for word in words)
    return bool(words) and _kept(answer) <= told and shared >= least * len(words)


def _kept(text: str) -> set[str]:
    """Numbers, codes and addresses of a text, whatever space is in them."""
    return {"".join(one.split()) for one in Protector([], {}, []).protect(text).kept}
