"""Looks at the registry every so often, and takes up what it names: champion, changes of its products, challenger."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from mlray.config import ConfigError, RunConfig, RunError
from mlray.release import bundle
from mlray.release.registry import Event, History, open_registry
from serve_app.slot import Slot
from serve_app.trials import Trials

log = logging.getLogger("mlray.serve")


class Watch:
    """What serves, and what is tried beside it."""

    def __init__(self, config: RunConfig) -> None:
        self._registry, self._watch_s = open_registry(config), config.serving.watch_s
        device = "cuda" if config.serving.gpus_per_replica else "cpu"
        self.slot = Slot(self._registry, config.serving, device)
        self.trials = Trials(self._registry, config.serving, device)
        self.fault = ""
        """What could not be taken up, for whoever asks."""
        self.said = ""
        """The same as the log has it, with places and reasons."""
        self._history = History()
        self._challenger: tuple[Event, dict[str, Any]] | None = None

    def begin(self) -> None:
        """Looks once, and from then on every `serving.watch_s`."""
        self.look()
        threading.Thread(target=self._go_on, daemon=True).start()

    def _go_on(self) -> None:
        while True:
            time.sleep(self._watch_s)
            self.look()

    def look(self) -> None:
        """Takes up the champion if the history names another than the one that serves, and changes of its products.

        What cannot be opened is told once in the log and by `fault`, and the one before it goes on.
        """
        works = {"the champion": self._take_up, "its products": self.slot.take, "the challenger": self._try}
        told = {what: _told(work) for what, work in works.items()}
        said = "; ".join(filter(None, told.values()))
        if said and said != self.said:
            log.error("nothing new is taken up: %s", said)
        self.said = said
        self.fault = "; ".join(
            f"{what} cannot be taken up; the log of the server says why" for what, why in told.items() if why
        )

    def _take_up(self) -> str:
        self._history = history = self._registry.history(self._history)
        self.trials.keep(history.challenger)  # who is challenger no more answers nobody, whatever follows
        if history.champion is None:
            return f"{self._registry.uri} has no champion"
        try:
            return self.slot.put(history.champion)
        finally:
            if self.slot.now is None:
                self._fall_back(history)

    def _fall_back(self, history: History) -> None:
        """Serves the newest champion of before that can be opened, where nothing serves yet."""
        for event in reversed(history.reigns[:-1]):
            if self.slot.now is None and not _told(functools.partial(self.slot.put, event)):
                log.error("%s serves meanwhile", event.bundle)

    def _try(self) -> str:
        event = self._history.challenger
        if event and (self._challenger is None or self._challenger[0] != event):
            self._challenger = event, bundle.report_of(self._registry, event.bundle)[0].cells
        return self.trials.look(event)

    @property
    def challenger(self) -> dict[str, Any] | None:
        """What `/v1/models` says of the challenger; None: there is none."""
        event = self._history.challenger
        if event is None:
            return None
        known = self._challenger[1] if self._challenger and self._challenger[0] == event else {}
        told = {"id": event.bundle, "since": event.when, "why": event.why, "report": known}
        return told | self.trials.about()


def _told(work: Callable[[], str | None]) -> str:
    """The fault that work tells or ends with; whatever it is, the watch goes on."""
    try:
        return work() or ""
    except (ConfigError, RunError) as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__} while a champion was looked for"
