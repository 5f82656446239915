"""What one pass over the whole corpus finds, and the run keeps: labels, and how often each item is there."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mlray import storage
from mlray.config import ConfigError, RunConfig
from mlray.corpus import fields, lines, records, scan
from mlray.corpus.fields import Record
from mlray.corpus.lines import Chunk
from mlray.corpus.manifest import Manifest
from mlray.corpus.mixture import Mixture
from mlray.models import tokenizer
from mlray.objectives import item_vectors
from mlray.objectives.table import OBJECTIVES
from mlray.training.folders import Folders


def keep_labels(config: RunConfig, manifest: Manifest, *, resumes: bool) -> None:
    """Writes the labels of all documents, in the order of the alphabet, unless a checkpoint depends on them.

    Raises:
        ConfigError: a record's labels do not fit its text.
    """
    place = Folders.of(config).labels
    without = OBJECTIVES[config.objective.name].labels_of is None
    if without or (resumes and storage.exists(place, config.storage)):
        return
    found: set[str] = set()
    for record, chunk in _records(config, manifest):
        found.update(_labels_of(record, chunk, config))
    body = json.dumps(sorted(found), ensure_ascii=False).encode()
    storage.write_bytes(place, body, config.storage)


def catalogue(config: RunConfig, manifest: Manifest) -> Counter[str]:
    """How often each item is there, those too that have a vector of their text alone."""
    place = config.recommendation.vectors
    known = Counter(dict.fromkeys(item_vectors.read(place, config.storage), 0) if place else {})
    for counts in _items(config, manifest).values():
        known.update(counts)
    return known


def _items(config: RunConfig, manifest: Manifest) -> dict[str, Counter[str]]:
    """Market -> how often each item is in its sessions."""
    found: dict[str, Counter[str]] = {}
    for record, _ in _records(config, manifest):
        found.setdefault(record.language, Counter()).update(fields.items(record.text))
    return found


def keep_frequencies(config: RunConfig, manifest: Manifest, tokens: Any, *, resumes: bool) -> None:
    """Writes how often the run draws each token as the right item (V,), of 1: that in each market by its share."""
    place = Folders.of(config).frequencies
    without = not OBJECTIVES[config.objective.name].of_items
    if without or (resumes and storage.exists(place, config.storage)):
        return
    mixture = Mixture.of(manifest, config.corpus, config.run.seed)
    documents, ids = manifest.documents(), tokens.get_vocab()
    drawn_V = np.zeros(len(tokens))
    counts = _items(config, manifest)
    for name, share in zip(mixture.languages, mixture.proportions, strict=True):
        for item, count in counts.get(name, Counter[str]()).items():
            if item in ids:
                drawn_V[ids[item]] += share * count / documents[name]
    drawn_V[tokenizer.vocabulary(tokens).special_V] = 0.0
    body = io.BytesIO()
    np.save(body, drawn_V / max(drawn_V.sum(), 1e-12), allow_pickle=False)
    storage.write_bytes(place, body.getvalue(), config.storage)


def open_frequencies(config: RunConfig) -> np.ndarray | None:
    """What `keep_frequencies` has written; None where items are not learnt."""
    if not OBJECTIVES[config.objective.name].of_items:
        return None
    body = storage.read_bytes(Folders.of(config).frequencies, config.storage)
    found: np.ndarray = np.load(io.BytesIO(body), allow_pickle=False)
    return found


def _records(config: RunConfig, manifest: Manifest) -> Iterator[tuple[Record, Chunk]]:
    """Every good record of the corpus."""
    for entry in manifest.chunks:
        with contextlib.suppress(lines.BrokenChunk):  # the manifest has told it already
            for batch in records.read(entry.chunk, config.corpus.max_chars, config.storage):
                yield from ((record, entry.chunk) for record in batch if not record.reason)


def _labels_of(record: Record, chunk: Chunk, config: RunConfig) -> Iterable[str]:
    labels_of = OBJECTIVES[config.objective.name].labels_of
    assert labels_of is not None
    try:
        return labels_of(record.text, record.pair, record.language, config.objective)
    except ConfigError as error:  # it calls the record document 0
        place = f"{chunk.file.uri}: {scan.where(chunk, record.row)}"
        raise ConfigError(f"{place}{str(error).removeprefix('document 0')}") from None
