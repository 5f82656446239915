"""Where the parts of a run lie."""

from __future__ import annotations

from dataclasses import dataclass

from mlray import storage
from mlray.config import RunConfig

WINNER = "winner.json"
"""Of a sweep, whose trials are runs below it: which of them has won."""


@dataclass(frozen=True)
class Folders:
    """Where the parts of a run lie."""

    root: str

    @classmethod
    def of(cls, config: RunConfig) -> Folders:
        """The folders of a configuration's run."""
        return cls(storage.join(storage.absolute(config.run.storage_uri), config.run.name))

    @property
    def corpus(self) -> str:
        """Manifest and quarantine."""
        return storage.join(self.root, "corpus")

    @property
    def imported(self) -> str:
        """What `datasets` has loaded, as parquet."""
        return storage.join(self.root, "imported")

    @property
    def tokenizer(self) -> str:
        """The tokenizer of the run."""
        return storage.join(self.root, "tokenizer")

    @property
    def labels(self) -> str:
        """The labels of the run, in the order of their numbers (JSON)."""
        return storage.join(self.root, "labels.json")

    @property
    def frequencies(self) -> str:
        """How often the run draws each token as the right item (a `.npy` of V numbers)."""
        return storage.join(self.root, "frequencies.npy")

    @property
    def checkpoints(self) -> str:
        """One folder a checkpoint."""
        return storage.join(self.root, "checkpoints")

    @property
    def events(self) -> str:
        """TensorBoard events."""
        return storage.join(self.root, "events")
