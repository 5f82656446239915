"""The registry: bundles that nobody changes, and a history that only grows; the champion is what it says last.

    bundles/<name>/         a model and its report, see `bundle`; BUNDLE.json names the sha256 of every file
    indexes/<name>/         vectors of products by the encoder of one bundle, see `index`; INDEX.json likewise
    history/00000001.json   one event: what was decided, by whom, when and why

An event is one conditional write, made when all that it names lies complete. So of two promoters one wins and the
other is told, and wherever a promotion is killed the champion is a bundle that is whole.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mlray import seal, storage
from mlray.config import ConfigError, RunConfig, RunError, Storage

MARKS = {"bundles": "BUNDLE.json", "indexes": "INDEX.json"}
"""Kind of thing -> the file that seals it."""
NUMBERED = re.compile(r"\d{8}\.json")
"""A file of a row that is written one by one; what a killed writer leaves beside them has another name."""


class ConflictError(RunError):
    """Another promoter was first; nothing was changed."""


@dataclass(frozen=True)
class Event:
    """One line of the history."""

    number: int
    action: Literal["challenge", "promote", "rollback"]
    bundle: str
    """The challenger, or who is champion from here on."""
    index: str | None
    who: str
    when: str
    """ISO 8601, UTC."""
    why: str
    verdict: dict[str, Any] | None = None
    """What the gate said."""
    knowledge: str | None = None
    """The index of what customer service answers with."""

    @property
    def served(self) -> tuple[str, str | None, str | None]:
        """Bundle and indexes."""
        return self.bundle, self.index, self.knowledge


@dataclass(frozen=True)
class History:
    """All events, the oldest first."""

    events: tuple[Event, ...] = ()

    @property
    def reigns(self) -> tuple[Event, ...]:
        """The promotions that hold, the last that of the champion: a rollback has taken those after it away."""
        found: list[Event] = []
        for event in self.events:
            if event.action == "promote":
                found.append(event)
            elif event.action == "rollback" and found:
                found.pop()
                back = [place for place, one in enumerate(found) if one.served == event.served]
                del found[back[-1] + 1 if back else len(found) :]
        return tuple(found)

    @property
    def champion(self) -> Event | None:
        """Whose bundle and index are served."""
        return self.reigns[-1] if self.reigns else None

    @property
    def challenger(self) -> Event | None:
        """The newest bundle that has asked for promotion and did not get it yet."""
        last = next((event for event in reversed(self.events) if event.action == "challenge"), None)
        promoted = {event.bundle for event in self.events if last and event.number > last.number}
        return None if last is None or last.bundle in promoted else last


_NOTHING = History()


@dataclass(frozen=True)
class Registry:
    """A folder or `s3://` prefix."""

    uri: str
    settings: Storage

    def history(self, known: History = _NOTHING) -> History:
        """The events up to now; those that are `known` are not read again, as nothing changes them.

        Raises:
            RunError: one is damaged, or missing.
        """
        folder = storage.join(self.uri, "history")
        events = list(known.events)
        found = [name for name in storage.walk(folder, self.settings) if NUMBERED.fullmatch(name)]
        for number, name in enumerate(found, start=1):
            place = storage.join(folder, f"{number:08d}.json")
            if storage.join(folder, name) != place:
                raise RunError(f"{place} is missing, and later events are there; restore it")
            if number <= len(known.events):
                continue
            try:
                events.append(Event(**json.loads(storage.read_bytes(place, self.settings))))
            except (ValueError, TypeError) as error:
                raise RunError(f"{place} is no event of a registry: {error}") from None
        return History(tuple(events))

    def append(self, after: History, **event: Any) -> Event:
        """Writes the event that follows `after`.

        Raises:
            ConflictError: another one follows it already.
            StorageError: it could not be written.
        """
        made = Event(
            number=len(after.events) + 1,
            who=_user(),
            when=datetime.now(UTC).isoformat(),
            **event,
        )
        place = storage.join(self.uri, "history", f"{made.number:08d}.json")
        body = json.dumps(asdict(made), ensure_ascii=False, indent=1).encode()
        if not storage.create_bytes(place, body, self.settings):
            first = self.history().events[made.number - 1]
            raise ConflictError(
                f"{first.who} was first: {first.action} of {first.bundle} at {first.when}; look at it and try again"
            )
        return made

    def put(self, kind: str, folder: Path, name: str, about: dict[str, Any]) -> str:
        """Keeps a local folder for ever, under a name that ends with the hash of its content, which is returned.

        Raises:
            RunError: it could not be written; then nothing counts as there.
        """
        files = seal.describe(folder)
        body = json.dumps(
            {"about": about, "files": files}, ensure_ascii=False, indent=1, sort_keys=True
        ).encode()
        full = f"{name}-{_short(body)}"
        target = storage.join(self.uri, kind, full)
        if self.fault(kind, full) is not None:  # else it is here already
            # Nothing is deleted but what is none of its files: another may be making the same, and has won already.
            storage.upload(folder, target, self.settings)
            storage.delete_others(target, {*files, MARKS[kind]}, self.settings)
            storage.write_bytes(storage.join(target, MARKS[kind]), body, self.settings)
            self.check(kind, full)
        return full

    def place(self, kind: str, name: str) -> str:
        """The folder of a bundle or index.

        Raises:
            ConfigError: it is no name of one.
        """
        if "/" in name or name.startswith(".") or not name:
            raise ConfigError(f"{name!r} is no name of a bundle or index")
        return storage.join(self.uri, kind, name)

    def about(self, kind: str, name: str) -> dict[str, Any]:
        """What a bundle or index says of itself.

        Raises:
            ConfigError: there is none of this name.
            RunError: it is damaged.
        """
        place = storage.join(self.place(kind, name), MARKS[kind])
        if not storage.exists(place, self.settings):
            raise ConfigError(
                f"{place} is not there; {self.uri} holds {', '.join(self.names(kind)) or 'none'}"
            )
        try:
            found: dict[str, Any] = json.loads(storage.read_bytes(place, self.settings))["about"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{place} is damaged: {error!r}") from None
        return found

    def names(self, kind: str) -> list[str]:
        """The bundles or indexes that are here; what has no seal is none yet."""
        folder, mark = storage.join(self.uri, kind), MARKS[kind]
        found = storage.list_folders(folder, self.settings)
        return [name for name in found if storage.exists(storage.join(folder, name, mark), self.settings)]

    def fault(self, kind: str, name: str) -> str | None:
        """None if a bundle or index is whole, file by file, and holds nothing else; otherwise what is wrong with it."""
        place, mark = self.place(kind, name), MARKS[kind]
        if fault := seal.verify(place, mark, self.settings):
            return fault
        body = storage.read_bytes(storage.join(place, mark), self.settings)
        if _short(body) != name.rpartition("-")[-1]:
            return f"{mark} does not match its name"
        there = {path for path in storage.walk(place, self.settings) if not storage.is_partial(path)}
        extra = sorted(there - {*json.loads(body)["files"], mark})
        return f"{extra[0]} is not one of its files" if extra else None

    def check(self, kind: str, name: str) -> None:
        """Refuses what is not whole.

        Raises:
            ConfigError: there is none of this name.
            RunError: a file is missing or altered.
        """
        self.about(kind, name)
        if fault := self.fault(kind, name):
            raise RunError(f"{self.place(kind, name)} is damaged: {fault}; nothing was changed")


def open_registry(config: RunConfig) -> Registry:
    """The registry of a configuration."""
    return Registry(storage.absolute(config.release.registry_uri), config.storage)


def _short(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:12]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return f"uid {os.getuid()}"
