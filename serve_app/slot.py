"""A place from which the bundle of an event is served: exchanged as a whole, or not at all."""

from __future__ import annotations

import contextlib
import logging

from mlray.access import StorageError
from mlray.config import ConfigError, RunError, Serving
from mlray.release.registry import Event, Registry
from serve_app.champion import Champion
from serve_app.reading import Reading

log = logging.getLogger("mlray.serve")


class Slot:
    """Holds what serves, and what could not."""

    def __init__(self, registry: Registry, settings: Serving, device: str) -> None:
        self._registry, self._settings, self._device = registry, settings, device
        self._refused: tuple[Event, str] | None = None
        self.now: Reading | None = None

    def put(self, event: Event) -> str:
        """Puts the bundle and indexes of an event in place; returns why the one before it still serves.

        What cannot be opened is not tried again, but where a storage could not be reached.

        Raises:
            ConfigError: it cannot be served, at the first try.
            RunError: a file is missing or altered, at the first try; or storage failed, at every.
        """
        if self.now and event == self.now.champion.event:
            return ""
        if self._refused and event == self._refused[0]:
            return self._refused[1]
        try:
            champion = Champion.open(self._registry, event, self._device)
        except StorageError:  # it may be there at the next look
            raise
        except (ConfigError, RunError) as error:
            self._refused = event, str(error)
            raise
        if champion.catalogue:
            with contextlib.suppress(RunError):  # `take` tells it at the next look; it serves without
                champion.catalogue.take()
        self.now = Reading.of(champion, self._settings)
        log.info("opened %s with %s", event.bundle, event.index or "no index")
        return ""

    def take(self) -> None:
        """Takes up changes of the products.

        Raises:
            RunError: one cannot be read.
        """
        if self.now and self.now.champion.catalogue:
            self.now.champion.catalogue.take()
