"""The champion as it is served: an encoder and the product index that it has built, opened together or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlray import languages, storage
from mlray.config import RunError
from mlray.evaluation.report import Report
from mlray.objectives.embedding import TextEmbedder
from mlray.release import bundle
from mlray.release.changes import Changes
from mlray.release.index import ProductIndex
from mlray.release.registry import Event, Registry
from serve_app.catalogue import Catalogue


@dataclass(frozen=True)
class Champion:
    """What one event of the history has put in place."""

    event: Event
    embedder: TextEmbedder
    catalogue: Catalogue | None
    report: Report
    languages: tuple[str, ...]
    """Those that the bundle was judged in, and the markets of the index where their tags are languages."""

    @classmethod
    def open(cls, registry: Registry, event: Event, device: str = "cpu") -> Champion:
        """Opens a bundle and its index.

        Raises:
            ConfigError: the bundle makes no vectors.
            RunError: a file is missing or altered, or the index is another encoder's.
        """
        registry.check("bundles", event.bundle)
        opened, catalogue = bundle.open_embedder(registry, event.bundle, device), None
        if event.index is not None:
            registry.check("indexes", event.index)
            if registry.about("indexes", event.index).get("bundle") != event.bundle:
                raise RunError(f"the index {event.index} is not of {event.bundle}")
            with storage.local_copy(registry.place("indexes", event.index), registry.settings) as folder:
                index = ProductIndex.load(folder)
            catalogue = Catalogue(index, Changes(registry, event.index), opened)
        report, _ = bundle.report_of(registry, event.bundle)
        judged = {languages.alone(name) for task in report.cells.values() for name in task}
        spoken = {part for name in judged for part in languages.halves(name)}
        return cls(event, opened, catalogue, report, tuple(sorted(spoken)))

    def about(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        return {
            "id": self.event.bundle,
            "index": self.event.index,
            "since": self.event.when,
            "why": self.event.why,
            "languages": list(self.languages),
            "markets": self.catalogue.markets if self.catalogue else {},
            "report": self.report.cells,
        }
