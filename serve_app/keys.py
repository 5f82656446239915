"""API keys: only their hashes are kept, with a name and a day after which they are good for nothing.

python -m serve_app.keys NAME --days 90 >> keys.jsonl       --writes: it may change products

That is the line for the file; the key itself is shown once, on standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from mlray import storage
from mlray.config import Storage
from serve_app.errors import ApiError

log = logging.getLogger("mlray.serve")

_PREFIX = "mlray-"


@dataclass(frozen=True)
class Key:
    """What is known of a key."""

    name: str
    expires: datetime
    writes: bool = False
    """Whether it may change products."""


@dataclass(frozen=True)
class Keys:
    """Who may ask."""

    known: Mapping[str, Key]
    """By the sha256 of the key."""

    @classmethod
    def read(cls, uri: str, settings: Storage) -> Keys:
        """The keys of a file, one JSON object a line; none if it is empty. A line that is no key is told in the log.

        Raises:
            StorageError: it cannot be read.
        """
        known = {}
        for number, line in enumerate(
            storage.read_bytes(uri, settings).decode(errors="replace").splitlines(), 1
        ):
            if not line.strip():
                continue
            try:
                digest, key = _parse(json.loads(line))
                known[digest] = key
            except (ValueError, KeyError, TypeError) as error:
                log.error("%s: line %d is no key: %s", uri, number, type(error).__name__)
        return cls(known)

    def check(self, header: str | None) -> Key:
        """The key in `Authorization: Bearer <key>`.

        Raises:
            ApiError: 401, as it is missing, unknown or expired.
        """
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "no_key", "send an API key as Authorization: Bearer <key>")
        found = self.known.get(_hash(key.strip()))
        if found is None:
            raise ApiError(401, "unknown_key", "the API key is unknown")
        if found.expires < datetime.now(UTC):
            raise ApiError(
                401, "expired_key", f"the API key {found.name} has expired on {found.expires.date()}"
            )
        return found


def _parse(told: dict[str, Any]) -> tuple[str, Key]:
    expires = datetime.fromisoformat(told["expires"])
    if expires.tzinfo is None:
        expires = expires.replace(tzinfo=UTC)
    return str(told["sha256"]), Key(str(told["name"]), expires, told.get("writes") is True)


def make(name: str, days: int, *, writes: bool = False) -> tuple[str, str]:
    """A new key, and its line for the file."""
    key = _PREFIX + secrets.token_urlsafe(32)
    expires = datetime.now(UTC) + timedelta(days=days)
    told = {
        "name": name,
        "sha256": _hash(key),
        "expires": expires.isoformat(timespec="seconds"),
        "writes": writes,
    }
    return key, json.dumps(told)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def main() -> None:
    """Prints the line of a new key, and the key beside it."""
    parser = argparse.ArgumentParser(description="Make an API key.")
    parser.add_argument("name", help="whose it is")
    parser.add_argument("--days", type=int, default=90, help="how long it is good")
    parser.add_argument("--writes", action="store_true", help="it may change products")
    arguments = parser.parse_args()
    key, line = make(arguments.name, arguments.days, writes=arguments.writes)
    print(line)
    print(f"the key of {arguments.name}, shown this once: {key}", file=sys.stderr)


if __name__ == "__main__":
    main()
