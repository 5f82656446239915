"""The challenger beside the champion: for a share of the customers (canary), or unseen (shadow), place by place.

A place is what is asked for in a market or language: `search de`, `recommend de`, `support de`. A customer stays with
the model that he had: his hash decides. The champion answers the same requests; a place in which the challenger fails,
or finds too little of what the champion finds, goes back to the champion by itself, and the others stay. Each replica
counts for itself, and tells the others where the trial was stopped by a file in the registry:

    trials/00000003/search/de      event of the challenge, place; holds the reason
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import replace
from typing import Any

from mlray import storage
from mlray.config import ConfigError, Serving
from mlray.corpus.fields import share_of
from mlray.release import promotion
from mlray.release.registry import Event, Registry
from serve_app.batching import TRIED
from serve_app.errors import ApiError
from serve_app.reading import Reading
from serve_app.slot import Slot

log = logging.getLogger("mlray.serve")

_WINDOW, _LEAST = 50, 20
"""Last answers of a place that count, and how many there must be before it can be stopped."""
_AT_ONCE = 8
"""Comparisons that run behind answers; more of them are left out."""
_TELLS_NOTHING = {"overloaded", "no_knowledge"}
"""Refusals by which a challenger is not measured."""
_FAILED = -1.0

Ask = Callable[[Reading], Awaitable[dict[str, Any]]]
"""Answers a request, of whichever bundle; see `agreement` for what is compared."""


class Trials:
    """`keep` and `look` are called by one thread, the others belong to one event loop."""

    def __init__(self, registry: Registry, settings: Serving, device: str) -> None:
        self._registry, self._settings = registry, settings
        self._slot = Slot(registry, settings, device)
        self._trial: Trial | None = None
        self._built: list[str] = []

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
        trial = self._trial
        try:
            return self._take_up(challenger)
        finally:
            try:
                if trial:
                    trial.share(self._registry)
            finally:
                self._slot.take()

    def _take_up(self, challenger: Event) -> str:
        trial = self._trial
        if trial and trial.reading.champion.event.knowledge is not None:
            return ""
        built = self._registry.names("indexes")
        if trial and built == self._built:
            return ""
        fault = self._slot.put(self._with_indexes(challenger))
        if fault or not self._slot.now:
            return fault
        self._built = built
        if trial:
            trial.reading = self._slot.now
        else:
            trial = Trial(self._slot.now, self._settings)
            trial.share(self._registry)  # it answers nobody before it knows where it was stopped
            self._trial = trial
        return ""

    def _with_indexes(self, challenger: Event) -> Event:
        """The challenger with what its encoder has built; answers of customer service may follow later.

        Raises:
            ConfigError: there is no index of products, or several.
        """
        if self._trial:
            index = self._trial.reading.champion.event.index
        else:
            index = promotion.only_index(self._registry, challenger.bundle, "index", newest=True)
        knowledge = None
        with contextlib.suppress(ConfigError):  # then the champion alone answers customer service
            knowledge = promotion.only_index(self._registry, challenger.bundle, "knowledge", newest=True)
        return replace(challenger, index=index, knowledge=knowledge)

    def reading(self, bundle: str) -> Reading | None:
        """The challenger that is tried, if it is this bundle."""
        trial = self._trial
        return trial.reading if trial and trial.reading.champion.event.bundle == bundle else None

    async def answer(self, now: Reading, ask: Ask, place: str, customer: str | None) -> dict[str, Any]:
        """The champion's answer, or for some customers the challenger's.

        Raises:
            ApiError: the champion refuses.
        """
        trial = self._trial
        if trial is None:
            return await ask(now)
        return await trial.answer(now, ask, place, customer)

    def about(self) -> dict[str, Any]:
        """How the challenger fares: agreement with the champion per place, and where it was stopped."""
        trial = self._trial
        return {"trial": trial.about()} if trial else {}


class Trial:
    """One challenger; all methods but `share` belong to one event loop."""

    def __init__(self, reading: Reading, settings: Serving) -> None:
        self.reading, self._settings = reading, settings
        self._seen: dict[str, deque[float]] = {}
        self._stopped: dict[str, str] = {}
        self._shared: set[str] = set()
        self._behind: set[asyncio.Task[None]] = set()

    def about(self) -> dict[str, Any]:
        """See `Trials.about`."""
        return {
            "canary": self._settings.canary,
            "shadow": self._settings.shadow,
            "agreement": {place: round(_mean(seen), 4) for place, seen in sorted(self._seen.items())},
            "stopped": dict(self._stopped),
        }

    def share(self, registry: Registry) -> None:
        """Tells other replicas, and those that begin later, where the trial was stopped, and learns it from them.

        Raises:
            RunError: storage failed.
        """
        folder = storage.join(registry.uri, "trials", f"{self.reading.champion.event.number:08d}")
        for path in storage.walk(folder, registry.settings):
            place = path.replace("/", " ")
            if place not in self._stopped and not storage.is_partial(path):
                why = storage.read_bytes(storage.join(folder, path), registry.settings).decode()
                self._shared.add(place)
                self._stopped[place] = why
                log.error("%s goes back to the champion, as another replica tells: %s", place, why)
        for place in self._stopped.keys() - self._shared:
            path, why = storage.join(folder, *place.split()), self._stopped[place]
            storage.create_bytes(path, why.encode(), registry.settings)  # or another has told it meanwhile
            self._shared.add(place)

    async def answer(self, now: Reading, ask: Ask, place: str, customer: str | None) -> dict[str, Any]:
        """See `Trials.answer`."""
        if place in self._stopped:
            return await ask(now)
        if customer is not None and self._takes(customer):
            told, fault = await self._tried(ask, place)
            if told is not None:
                self._behind_it(self._compared(place, told, ask, now))
                return told
            found = await ask(now)
            if fault:  # the champion answers what the challenger does not: the request is good
                self._fails(place, fault)
            return found
        found = await ask(now)
        if random.random() < self._settings.shadow:
            self._behind_it(self._shadowed(place, found, ask))
        return found

    async def _tried(self, ask: Ask, place: str) -> tuple[dict[str, Any] | None, str]:
        """The challenger's answer; or None, and what is to be counted as its failure if the request is good."""
        try:
            async with asyncio.timeout(self._settings.timeout_s * TRIED):  # the champion needs the rest
                return await ask(self.reading), ""
        except TimeoutError as error:  # the champion may have no time left to show that the request is good
            self._fails(place, type(error).__name__)
            return None, ""
        except Exception as error:  # whatever it is, the champion answers
            counts = not (isinstance(error, ApiError) and error.code in _TELLS_NOTHING)
            return None, type(error).__name__ if counts else ""

    async def _compared(self, place: str, found: dict[str, Any], ask: Ask, now: Reading) -> None:
        try:
            self._tell(place, agreement(found, await ask(now)))
        except Exception as error:  # the champion's own fault says nothing of the challenger
            log.warning("the champion has failed behind a trial, %s: %s", place, type(error).__name__)

    async def _shadowed(self, place: str, found: dict[str, Any], ask: Ask) -> None:
        told, fault = await self._tried(ask, place)
        if told is not None:
            self._tell(place, agreement(told, found))
        elif fault:
            self._fails(place, fault)

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

    def _fails(self, place: str, fault: str) -> None:
        log.warning("the challenger has failed, %s: %s", place, fault)
        self._tell(place, _FAILED)

    def _tell(self, place: str, agreed: float) -> None:
        """Counts an answer, and stops the trial in its place if the last ones there were too bad."""
        seen = self._seen.setdefault(place, deque(maxlen=_WINDOW))
        seen.append(agreed)
        if len(seen) < _LEAST or place in self._stopped:
            return
        if (mean := _mean(seen)) < self._settings.agreement:
            failed = sum(one == _FAILED for one in seen)
            self._stopped[place] = (
                f"of the last {len(seen)} requests {failed} failed, and {mean:.0%} of what the champion finds was "
                f"found; serving.agreement={self._settings.agreement:g}"
            )
            log.error("%s goes back to the champion: %s", place, self._stopped[place])


def _mean(seen: Collection[float]) -> float:
    """Of some answers; one that failed has found nothing."""
    return sum(max(one, 0.0) for one in seen) / len(seen)


def agreement(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The share of what was found that two answers have in common, of 1; two empty ones agree.

    Of customer service, whether both answer with the same, or leave it to a person.
    """
    a, b = (
        {one["id"] for one in told["results"]} if "results" in told else {told["intent"]}
        for told in (first, second)
    )
    return len(a & b) / max(len(a), len(b)) if a or b else 1.0
