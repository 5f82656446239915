"""A place from which the bundle of an event is served: exchanged as a whole, or not at all."""

from __future__ import annotations

import contextlib
import logging
import time

from mlray.access import StorageError
from mlray.config import ConfigError, RunError, Serving
from mlray.release.registry import Event, Registry
from serve_app.champion import Champion
from serve_app.reading import Reading

log = logging.getLogger("mlray.serve")

_AGAIN_S = 60.0
"""What cannot be opened is left alone for so long: whoever restores a file needs no other promotion."""


class Slot:
    """Holds what serves, and what could not."""

    def __init__(self, registry: Registry, settings: Serving, device: str) -> None:
        self._registry, self._settings, self._device = registry, settings, device
        self._refused: dict[int, tuple[str, float]] = {}
        """Number of an event -> why it cannot be served, and when that may have been mended."""
        self.now: Reading | None = None

    def put(self, event: Event) -> str:
        """Puts the bundle and indexes of an event in place; returns why the one before it still serves.

        What cannot be opened is tried again after `_AGAIN_S`; where a storage could not be reached, at once.

        Raises:
            ConfigError: it cannot be served, at each try.
            RunError: a file is missing or altered, or storage failed, at each try.
        """
        if self.now and event == self.now.champion.event:
            return ""
        why, again = self._refused.get(event.number, ("", 0.0))
        if time.monotonic() < again:
            return why
        try:
            champion = Champion.open(self._registry, event, self._device)
            if champion.catalogue:
                with contextlib.suppress(RunError):  # `take` tells it at the next look; it serves without
                    champion.catalogue.take()
            used = self.now.adapters.loaded if self.now else ()
            now = Reading.of(champion, self._settings, used)
        except StorageError:  # it may be there at the next look
            raise
        except Exception as error:
            ours = isinstance(error, ConfigError | RunError)
            why = str(error) if ours else f"{event.bundle} cannot be opened: {type(error).__name__}"
            self._refused[event.number] = why, time.monotonic() + _AGAIN_S
            raise
        self.now = now
        log.info("opened %s with %s", event.bundle, event.index or "no index")
        return ""

    def take(self) -> None:
        """Takes up changes of the products.

        Raises:
            RunError: one cannot be read.
        """
        if self.now and self.now.champion.catalogue:
            self.now.champion.catalogue.take()
