"""Other names for labels: a table with a header, one column of the labels in the data and one of those to use."""

from __future__ import annotations

import csv
from pathlib import PurePosixPath

from mlray import storage
from mlray.config import ConfigError, Storage

LabelMap = tuple[tuple[str, str], ...]


def read(spec: str, settings: Storage) -> LabelMap:
    """The pairs (label in the data, label to use) of `uri:from:to`; spaces of the label to use become underscores.

    Raises:
        ConfigError: not of this form, a column is missing, or a label stands twice.
        StorageError: the file cannot be reached.
    """
    uri, *columns = spec.rsplit(":", 2)
    if len(columns) != 2:
        raise ConfigError(f"corpus.sources[].label_map={spec!r} is not of the form uri:from:to")
    try:
        text = storage.read_bytes(storage.absolute(uri), settings).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the label map {uri} is no UTF-8: {error}") from None
    delimiter = "\t" if PurePosixPath(uri).suffix == ".tsv" else ","
    table = csv.DictReader(text.splitlines(), delimiter=delimiter)
    header = table.fieldnames or []
    missing = [column for column in columns if column not in header]
    if missing:
        raise ConfigError(
            f"the label map {uri} has no column {missing[0]!r}, only {', '.join(header) or 'none'}"
        )
    found: dict[str, str] = {}
    for row in table:
        label = (row[columns[0]] or "").strip()
        if label in found:
            raise ConfigError(f"the label map {uri} names {label!r} twice")
        found[label] = "_".join((row[columns[1]] or "").split())
    return tuple(found.items())
