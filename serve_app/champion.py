"""The champion as it is served: an encoder and the product index that it has built, opened together or not at all."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlray import languages, storage
from mlray.config import ConfigError, RunError
from mlray.corpus import vectors
from mlray.evaluation import recommendation
from mlray.evaluation.report import Report
from mlray.objectives.embedding import TextEmbedder
from mlray.objectives.recommending import NextItem
from mlray.release import bundle, companions, markets
from mlray.release.changes import Changes
from mlray.release.companions import Composer, Translator
from mlray.release.index import ProductIndex
from mlray.release.registry import Event, Registry
from serve_app.catalogue import Catalogue

_OF_MARKETS = {"recommendation", recommendation.CATALOGUE}
"""Tasks whose names are markets, and not what people speak there."""


@dataclass(frozen=True)
class Champion:
    """What one event of the history has put in place."""

    registry: Registry
    event: Event
    embedder: TextEmbedder | None
    """None: the bundle is a recommender or a translator alone."""
    catalogue: Catalogue | None
    knowledge: Catalogue | None
    recommender: NextItem | None
    """Of sessions; None: by texts alone."""
    translator: Translator | None
    writer: Composer | None
    """Of answers from passages."""
    report: Report
    languages: tuple[str, ...]
    """Those that the bundle was judged in."""
    adapters: tuple[str, ...]
    """Markets that have an adapter of their own."""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Of the encoder: adapters come and go between two passes."""

    @classmethod
    def open(cls, registry: Registry, event: Event, device: str = "cpu") -> Champion:
        """Opens a bundle and its index.

        Raises:
            ConfigError: nothing of the bundle can be served.
            RunError: a file is missing or altered, or the index is another encoder's.
        """
        registry.check("bundles", event.bundle)
        about = registry.about("bundles", event.bundle)
        embedder = None if companions.alone(about) else bundle.open_embedder(registry, event.bundle, device)
        adapters = markets.tags(about)
        report, _ = bundle.report_of(registry, event.bundle)
        judged = {
            languages.alone(name)
            for task, cells in report.cells.items()
            if task.partition(" ")[0] not in _OF_MARKETS
            for name in cells
        }
        spoken = {part for name in judged for part in languages.halves(name)}
        anew = functools.partial(bundle.open_reader, registry, event.bundle, device)
        alone = functools.partial(markets.plain, embedder) if embedder else anew
        mixed = anew if adapters else alone  # the adapters of all markets at a time
        catalogue = (
            _catalogue(
                registry, event, event.index, mixed, Changes(registry), adapters, by_id=embedder is None
            )
            if event.index
            else None
        )
        # A question may be answered in any language, so answers are read without the adapter of one.
        knowledge = _catalogue(registry, event, event.knowledge, alone) if event.knowledge else None
        companion = functools.partial(companions.open_companion, registry, event.bundle, device=device)
        return cls(
            registry=registry,
            event=event,
            embedder=embedder,
            catalogue=catalogue,
            knowledge=knowledge,
            recommender=companion("recommender"),
            translator=companion("translator"),
            writer=companion("writer"),
            report=report,
            languages=tuple(sorted(spoken)),
            adapters=tuple(adapters),
        )

    @property
    def encoder(self) -> TextEmbedder:
        """Its encoder of texts.

        Raises:
            ConfigError: it has none.
        """
        if self.embedder is None:
            raise ConfigError(f"{self.event.bundle} makes no vectors of texts")
        return self.embedder

    @property
    def writes(self) -> set[str]:
        """The languages that its writer was judged in."""
        return (
            {name.partition("-")[0] for name in self.report.cells.get("causal", ())} if self.writer else set()
        )

    def load(self, tag: str) -> None:
        """Puts a market's adapter into the encoder.

        Raises:
            ConfigError: it does not fit.
            RunError: it cannot be read.
        """
        place = bundle.place_of(self.registry, self.event.bundle, tag)
        with storage.local_copy(place, self.registry.settings) as folder, self.lock:
            self.encoder.load(tag, folder)

    def unload(self, tag: str) -> None:
        """Takes a market's adapter out of the encoder."""
        with self.lock:
            self.encoder.unload(tag)

    def read(self, asked: Sequence[Cut]) -> np.ndarray:
        """Unit vectors of texts, each by its adapter, in one forward pass."""
        with self.lock:
            return self.encoder.read([one.tokens for one in asked], [one.adapter for one in asked])

    def about(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        ways = sorted(self.report.cells.get("translation", ())) if self.translator else []
        return {
            "id": self.event.bundle,
            "index": self.event.index,
            "knowledge": self.event.knowledge,
            "since": self.event.when,
            "why": self.event.why,
            "languages": list(self.languages),
            "adapters": list(self.adapters),
            "recommends": self.recommender.markets if self.recommender else [],
            "translates": ways,
            "targets": sorted({languages.target(way) for way in ways}),
            "writes": sorted(self.writes),
            "markets": self.catalogue.markets if self.catalogue else {},
            "answers": self.knowledge.markets if self.knowledge else {},
            "report": self.report.cells,
        }


@dataclass(frozen=True)
class Cut:
    """A text as the encoder reads it."""

    tokens: list[int]
    adapter: str | None


def _catalogue(
    registry: Registry,
    event: Event,
    name: str,
    opened: Callable[[], vectors.Read],
    changes: Changes | None = None,
    adapters: Sequence[str] = (),
    *,
    by_id: bool = False,
) -> Catalogue:
    registry.check("indexes", name)
    about = registry.about("indexes", name)
    if about.get("bundle") != event.bundle:
        raise RunError(f"the index {name} is not of {event.bundle}")
    with storage.local_copy(registry.place("indexes", name), registry.settings) as folder:
        index = ProductIndex.load(folder)
    position = int(about.get("position", 0))
    return Catalogue(index, opened, changes, position, by_id=by_id, adapters=adapters)
