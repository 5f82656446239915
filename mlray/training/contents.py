"""What is known of a corpus once all of it was read, and kept by the run: labels, items and how often they are."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mlray import storage
from mlray.config import ConfigError, RunConfig, Storage
from mlray.corpus import lines, records, scan, sessions
from mlray.corpus.fields import Record
from mlray.corpus.lines import Chunk
from mlray.corpus.manifest import Manifest
from mlray.corpus.mixture import Mixture
from mlray.models import tokenizer
from mlray.objectives import item_vectors, labels, multitask
from mlray.objectives.table import OBJECTIVES
from mlray.schema import QUERY
from mlray.training import resume
from mlray.training.checkpoint import Checkpoint
from mlray.training.folders import Folders


def keep_labels(config: RunConfig, manifest: Manifest, *, resumes: bool) -> None:
    """Writes the labels of all documents, in the order of the alphabet, unless a checkpoint depends on them.

    Raises:
        ConfigError: a record's labels do not fit its text or the other records'; the row is named.
    """
    place = Folders.of(config).labels
    without = OBJECTIVES[config.objective.name].labels_of is None
    if without or (resumes and storage.exists(place, config.storage)):
        return
    found: dict[str, str] = {}
    for record, chunk in _records(config, manifest):
        row = f"{chunk.file.uri}: {scan.where(chunk, record.row)}"
        for label in _labels_of(record, row, config):
            found.setdefault(label, row)
    _check_tags(found, config)
    body = json.dumps(sorted(found), ensure_ascii=False).encode()
    storage.write_bytes(place, body, config.storage)


def keep_vectors(config: RunConfig, found: Checkpoint | None) -> RunConfig:
    """The configuration with a copy of the items' vectors in the run folder, named by its hash.

    A resumed run goes on with the one of its checkpoint, whatever became of the file that it is a copy of.

    Raises:
        ConfigError: there are none; or there are some where the checkpoint had none, or none where it had some; or a
            trained model, which holds what it has made of them, is named too.
        StorageError: they cannot be reached.
    """
    given, root = config.recommendation.vectors, Folders.of(config).root
    before = resume.vectors(config, found) if found else None
    if found and bool(given) != bool(before):
        raise ConfigError(
            f"recommendation.vectors={given} but {found.uri} was trained with {before}; set it back, choose another "
            "run.name, or start over with train.resume=false"
        )
    if given is None:
        return config
    if config.model.path:
        raise ConfigError(
            "recommendation.vectors is for a fresh model, and model.path names a trained one; leave one of them out"
        )
    own = storage.join(root, before) if before else _copied(given, root, config.storage)
    section = config.recommendation.model_copy(update={"vectors": own})
    return config.model_copy(update={"recommendation": section})


def _copied(given: str, root: str, settings: Storage) -> str:
    if not storage.exists(given, settings):
        raise ConfigError(f"recommendation.vectors={given} is not there; jobs/embed.py makes such a file")
    with storage.local_copy(given, settings) as file:
        own = storage.join(root, f"items-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}.parquet")
        if not storage.exists(own, settings):
            storage.upload(file, own, settings)
    return own


def catalogue(config: RunConfig, manifest: Manifest) -> Counter[str]:
    """How often each item is there, those too that have a vector of their text alone.

    Raises:
        ConfigError: there is no room for all of them in the vocabulary.
    """
    place = config.recommendation.vectors
    texts = item_vectors.read(place, config.storage) if place else {}
    known = Counter(dict.fromkeys(texts, 0))
    for counts in _items(config, manifest).values():
        known.update(counts)
    room = config.tokenizer.vocab_size - len(tokenizer.special_tokens(manifest.languages))
    number = sum(not name.startswith(QUERY) for name in known)
    words = len(known) - number
    if any(source.query for source in config.corpus.sources) and (not words or number >= room):
        why = f"{number:,} items fill tokenizer.vocab_size" if words else "no session has one"
        raise ConfigError(f"corpus.sources[].query is set, and no word of a query has a token: {why}")
    if texts and number > room:
        raise ConfigError(
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} has room for {room:,} of {number:,} items, and "
            f"those that nobody has bought would go first; set it to {config.tokenizer.vocab_size + number - room}"
        )
    return known


def _items(config: RunConfig, manifest: Manifest) -> dict[str, Counter[str]]:
    """Market -> how often each item, and each word of a query, is in its sessions."""
    found: dict[str, Counter[str]] = {}
    for record, _ in _records(config, manifest):
        found.setdefault(record.language, Counter()).update(sessions.tokens(record.text))
    return found


def keep_frequencies(config: RunConfig, manifest: Manifest, tokens: Any, *, resumes: bool) -> None:
    """Writes how often the run draws each token as the right item (V,), of 1: that in each market by its share.

    Only of a run that draws its candidates.
    """
    place, row = Folders.of(config).frequencies, OBJECTIVES[config.objective.name]
    without = not row.of_items or config.recommendation.candidates == "all"
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
    """What `keep_frequencies` has written; None where candidates are not drawn."""
    place = Folders.of(config).frequencies
    if not OBJECTIVES[config.objective.name].of_items or not storage.exists(place, config.storage):
        return None
    body = storage.read_bytes(place, config.storage)
    found: np.ndarray = np.load(io.BytesIO(body), allow_pickle=False)
    return found


def _records(config: RunConfig, manifest: Manifest) -> Iterator[tuple[Record, Chunk]]:
    """Every good record of the corpus."""
    for entry in manifest.chunks:
        with contextlib.suppress(lines.BrokenChunk):  # the manifest has told it already
            for batch in records.read(entry.chunk, config.corpus.max_chars, config.storage):
                yield from ((record, entry.chunk) for record in batch if not record.reason)


def _labels_of(record: Record, place: str, config: RunConfig) -> Iterable[str]:
    labels_of = OBJECTIVES[config.objective.name].labels_of
    assert labels_of is not None
    try:
        return labels_of(record.text, record.pair, record.language, config.objective)
    except ConfigError as error:  # it calls the record document 0
        raise ConfigError(f"{place}{str(error).removeprefix('document 0')}") from None


def _check_tags(found: dict[str, str], config: RunConfig) -> None:
    """Refuses tags that could not be scored, with the place that each label is found at."""
    heads = {name: str(head.objective) for name, head in config.objective.heads.items()}
    places = list(found.values())
    for task, objective in (heads or {"": config.objective.name}).items():
        if objective == "tagging":
            own = multitask.own_labels(list(found), task)
            labels.mark_spans({tag: places[number] for tag, number in own.items()})
