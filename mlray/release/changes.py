"""What has changed of an index's products since it was built: a row of files, each one conditional write.

    changes/<index>/00000001.json    products that came or became others, and those that went

All who serve the index read them in this order, and make vectors by the encoder of its own bundle. An index that is
built anew begins without any: it is made of the shop's catalogue, which is the truth.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass

from mlray import storage
from mlray.config import RunError
from mlray.release.registry import Registry


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
    """The changes of one index."""

    registry: Registry
    index: str

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

    def after(self, number: int) -> list[Change]:
        """The changes behind a number, the oldest first.

        Raises:
            RunError: one is damaged.
        """
        found = []
        while storage.exists(place := self._place(number + 1), self.registry.settings):
            try:
                told = json.loads(storage.read_bytes(place, self.registry.settings))
                products = tuple(Product(**one) for one in told["upsert"])
                found.append(Change(products, tuple((market, name) for market, name in told["delete"])))
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{place} is no change of an index: {error!r}") from None
            number += 1
        return found

    def _place(self, number: int) -> str:
        return storage.join(self.registry.uri, "changes", self.index, f"{number:08d}.json")
