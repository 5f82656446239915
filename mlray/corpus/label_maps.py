"""Other names for labels: a table with a header, one column of the labels in the data and one of those to use."""

from __future__ import annotations

import csv
import io
from pathlib import PurePosixPath

from mlray import storage
from mlray.config import ConfigError, Storage
from mlray.corpus.cleaning import BadRecord, clean

LabelMap = tuple[tuple[str, str], ...]
_MAX_CHARS = 1000


def read(spec: str, settings: Storage) -> LabelMap:
    """The pairs (label in the data, label to use) of `uri:from:to`; spaces of the label to use become underscores.

    Raises:
        ConfigError: not of this form, a column is missing, or a label stands twice or has no name.
        StorageError: the file cannot be reached.
    """
    uri, *columns = spec.rsplit(":", 2)
    if len(columns) != 2:
        raise ConfigError(f"sources[].label_map={spec!r} is not of the form uri:from:to")
    try:
        text = storage.read_bytes(storage.absolute(uri), settings).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the label map {uri} is no UTF-8: {error}") from None
    delimiter = "\t" if PurePosixPath(uri).suffix == ".tsv" else ","
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = table.fieldnames or []
    missing = [column for column in columns if column not in header]
    if missing:
        raise ConfigError(
            f"the label map {uri} has no column {missing[0]!r}, only {', '.join(header) or 'none'}"
        )
    found: dict[str, str] = {}
    for row in table:
        try:
            label, name = (clean(row[column], _MAX_CHARS) for column in columns)
        except BadRecord as error:
            raise ConfigError(f"the label map {uri}, line {table.line_num}: {error}") from None
        if label in found:
            raise ConfigError(f"the label map {uri} names {label!r} twice")
        found[label] = "_".join(name.split())
    return tuple(found.items())
