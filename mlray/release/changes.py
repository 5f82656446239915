"""What has changed of the products since indexes were built: a row of files, each one conditional write.

    changes/00000001.json    products that came or became others, and those that went

All who serve read them in this order, and make vectors by the encoder of their own bundle. An index knows how many
there were when it was begun (`position`), as the shop's catalogue, which it is made of, has those; what came later is
applied to it wherever it is served, also after a promotion or a rollback.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from mlray import storage
from mlray.config import RunError
from mlray.release.registry import NUMBERED, Registry

_FOLDER = "changes"
_READERS = 10
"""Changes that are read at a time: as many connections to S3 as botocore keeps."""


@dataclass(frozen=True)
class Product:
    """A product of a market."""

    market: str
    id: str
    text: str
    """What its vector is made of; the first line is its title."""


@dataclass(frozen=True)
class Change:
    """Products that came or became others, then those that went."""

    upsert: tuple[Product, ...] = ()
    delete: tuple[tuple[str, str], ...] = ()
    """(market, id)"""


@dataclass(frozen=True)
class Changes:
    """The changes of a registry."""

    registry: Registry

    @property
    def position(self) -> int:
        """How many there are."""
        names = storage.walk(storage.join(self.registry.uri, _FOLDER), self.registry.settings)
        return sum(NUMBERED.fullmatch(name) is not None for name in names)  # others a killed writer has left

    def append(self, change: Change, after: int) -> int:
        """Writes a change behind all that there are, and returns its number.

        Args:
            change: what it is.
            after: a number that is known to be taken.

        Raises:
            StorageError: it could not be written; then it counts nowhere.
        """
        # Two writers must not write the same (`storage.create_bytes`).
        body = json.dumps({**asdict(change), "nonce": secrets.token_hex(8)}, ensure_ascii=False).encode()
        number = after + 1
        while not storage.create_bytes(self._place(number), body, self.registry.settings):
            number += 1
        return number

    def after(self, number: int) -> Iterator[Change]:
        """The changes behind a number, the oldest first.

        Raises:
            RunError: one is damaged.
        """
        if (change := self._read(number + 1)) is None:
            return
        yield change
        # One that starts may have thousands to read, of which each takes a round trip; mostly there is one.
        following, at_a_time = number + 2, 1
        with ThreadPoolExecutor(_READERS) as readers:
            while True:
                for one in readers.map(self._read, range(following, following + at_a_time)):
                    if one is None:
                        return
                    yield one
                following, at_a_time = following + at_a_time, min(2 * at_a_time, _READERS)

    def _read(self, number: int) -> Change | None:
        """The change of a number; None if there is none yet."""
        place = self._place(number)
        if not storage.exists(place, self.registry.settings):
            return None
        try:
            told = json.loads(storage.read_bytes(place, self.registry.settings))
            products = tuple(Product(**one) for one in told["upsert"])
            return Change(products, tuple((market, name) for market, name in told["delete"]))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{place} is no change of products: {error!r}") from None

    def _place(self, number: int) -> str:
        return storage.join(self.registry.uri, _FOLDER, f"{number:08d}.json")
