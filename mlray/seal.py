"""Sealed folders: the last file to be written names the sha256 of every other one.

Without that file, or with one that does not match it, a folder is not what it claims to be: a checkpoint, a bundle, an
index.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mlray import storage
from mlray.config import Storage

_DIGEST_BYTES = 32 << 20


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """sha256 and size of every file below a local folder, by its path from there."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
    return files


def digest(folder: Path) -> str:
    """sha256 over names and contents of all files below a local folder."""
    return hashlib.sha256(json.dumps(describe(folder), sort_keys=True).encode()).hexdigest()


def verify(uri: str, mark: str, settings: Storage) -> str | None:
    """None if every file of a folder is as the file `mark` in it says, else the fault."""
    if not storage.exists(storage.join(uri, mark), settings):
        return f"it has no {mark}"
    try:
        body = json.loads(storage.read_bytes(storage.join(uri, mark), settings))
        digests = {str(name): str(entry["sha256"]) for name, entry in body["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{mark} is damaged"
    for name, expected in digests.items():
        place = storage.join(uri, name)
        if not storage.exists(place, settings):
            return f"{name} is missing"
        digest = hashlib.sha256()
        with storage.open_input(place, settings) as file:
            while block := file.read(_DIGEST_BYTES):
                digest.update(block)
        if digest.hexdigest() != expected:
            return f"{name} does not match its sha256"
    return None
