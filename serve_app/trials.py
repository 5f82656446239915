"""The challenger beside the champion: for a share of the customers (canary), or unseen (shadow), market by market.

A customer stays with the model that he had: his hash decides. The champion answers the same searches; a market in whose
language the challenger fails, or finds too little of what the champion finds, goes back to the champion by itself, and
the others stay. Each replica counts for itself.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import replace
from typing import Any

from mlray.config import Serving
from mlray.corpus.fields import share_of
from mlray.release import promotion
from mlray.release.registry import Event, Registry
from serve_app.errors import ApiError
from serve_app.reading import Reading
from serve_app.slot import Slot

log = logging.getLogger("mlray.serve")

_WINDOW, _LEAST = 50, 20
"""Last searches of a market that count, and how many there must be before it can be stopped."""
_AT_ONCE = 8
"""Comparisons that run behind answers; more of them are left out."""
_FAILED = -1.0

Ask = Callable[[Reading], Awaitable[dict[str, Any]]]
"""A search, of whichever bundle."""


class Trials:
    """All methods but `look` belong to one event loop."""

    def __init__(self, registry: Registry, settings: Serving, device: str) -> None:
        self._registry, self._settings = registry, settings
        self._slot = Slot(registry, settings, device)
        self._trial: Trial | None = None

    def keep(self, challenger: Event | None) -> None:
        """Ends the trial of whoever is not the challenger."""
        trial = self._trial
        if trial and (challenger is None or trial.reading.champion.event.number != challenger.number):
            self._trial, self._slot.now = None, None

    def look(self, challenger: Event | None) -> str:
        """Takes up the challenger, with the index that its encoder has built; returns why it does not.

        Raises:
            ConfigError: it has no index, or cannot be opened.
            RunError: a file is missing or altered, or storage failed.
        """
        if challenger is None or not (self._settings.canary or self._settings.shadow):
            return ""
        fault = ""
        if self._trial is None:
            index = promotion.only_index(self._registry, challenger.bundle, "index")
            fault = self._slot.put(replace(challenger, index=index))
            if not fault and self._slot.now:
                self._trial = Trial(self._slot.now, self._settings)
        self._slot.take()
        return fault

    async def answer(self, now: Reading, ask: Ask, market: str, customer: str | None) -> dict[str, Any]:
        """The champion's answer, or for some customers the challenger's.

        Raises:
            ApiError: the champion refuses.
        """
        trial = self._trial
        if trial is None:
            return await ask(now)
        return await trial.answer(now, ask, market, customer)

    def about(self) -> dict[str, Any]:
        """How the challenger fares: agreement with the champion per market, and where it was stopped."""
        trial = self._trial
        return {"trial": trial.about()} if trial else {}


class Trial:
    """One challenger."""

    def __init__(self, reading: Reading, settings: Serving) -> None:
        self.reading, self._settings = reading, settings
        self._seen: dict[str, deque[float]] = {}
        self._stopped: dict[str, str] = {}
        self._behind: set[asyncio.Task[None]] = set()

    def about(self) -> dict[str, Any]:
        """See `Trials.about`."""
        return {
            "canary": self._settings.canary,
            "shadow": self._settings.shadow,
            "agreement": {market: round(_mean(seen), 4) for market, seen in sorted(self._seen.items())},
            "stopped": dict(self._stopped),
        }

    async def answer(self, now: Reading, ask: Ask, market: str, customer: str | None) -> dict[str, Any]:
        """See `Trials.answer`."""
        if market in self._stopped:
            return await ask(now)
        if customer is not None and self._takes(customer):
            found = await self._tried(ask, market)
            if found is None:
                return await ask(now)
            self._behind_it(self._compared(market, found, ask, now))
            return found
        found = await ask(now)
        if random.random() < self._settings.shadow:
            self._behind_it(self._shadowed(market, found, ask))
        return found

    async def _tried(self, ask: Ask, market: str) -> dict[str, Any] | None:
        """The challenger's answer; None if it has none in half of the time, which counts but where too much waits."""
        try:
            async with asyncio.timeout(self._settings.timeout_s / 2):  # the champion needs the rest
                return await ask(self.reading)
        except Exception as error:  # whatever it is, the champion answers
            if not isinstance(error, ApiError) or error.status != 429:
                log.warning("the challenger has failed in %s: %s", market, type(error).__name__)
                self._tell(market, _FAILED)
            return None

    async def _compared(self, market: str, found: dict[str, Any], ask: Ask, now: Reading) -> None:
        try:
            self._tell(market, agreement(found, await ask(now)))
        except Exception as error:  # the champion's own fault says nothing of the challenger
            log.warning("the champion has failed in %s behind a trial: %s", market, type(error).__name__)

    async def _shadowed(self, market: str, found: dict[str, Any], ask: Ask) -> None:
        told = await self._tried(ask, market)
        if told is not None:
            self._tell(market, agreement(told, found))

    def _behind_it(self, comparing: Coroutine[Any, Any, None]) -> None:
        """Compares while the answer is on its way, if not too many do."""
        if len(self._behind) >= _AT_ONCE:
            comparing.close()
            return
        task = asyncio.get_running_loop().create_task(comparing)
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    def _takes(self, customer: str) -> bool:
        """Whether a customer is one of the canary's: another bundle draws others."""
        return share_of(f"{self.reading.champion.event.bundle} {customer}") < self._settings.canary

    def _tell(self, market: str, agreed: float) -> None:
        """Counts a search, and stops the market's trial if its last ones were too bad."""
        seen = self._seen.setdefault(market, deque(maxlen=_WINDOW))
        seen.append(agreed)
        if len(seen) < _LEAST or market in self._stopped:
            return
        if (mean := _mean(seen)) < self._settings.agreement:
            failed = sum(one == _FAILED for one in seen)
            self._stopped[market] = (
                f"of the last {len(seen)} searches {failed} failed, and {mean:.0%} of what the champion finds was "
                f"found; serving.agreement={self._settings.agreement:g}"
            )
            log.error("%s goes back to the champion: %s", market, self._stopped[market])


def _mean(seen: Collection[float]) -> float:
    """Of some searches; one that failed has found nothing."""
    return sum(max(one, 0.0) for one in seen) / len(seen)


def agreement(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The share of the results that two answers have in common, of 1; two empty ones agree."""
    a, b = ({one["id"] for one in told["results"]} for told in (first, second))
    return len(a & b) / max(len(a), len(b)) if a or b else 1.0
