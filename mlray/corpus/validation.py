"""Held-out documents as packed rows: each row holds one language, so every figure is a language's own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from mlray.corpus import packing
from mlray.corpus.manifest import Manifest
from mlray.corpus.packing import Cutter
from mlray.corpus.windows import Window
from mlray.schema import SEPARATOR, PackedBatch, packed_schema

_FIRST_WINDOW = 1 << 40
"""Windows of validation are numbered from here, so that their masks never are those of a training row."""


def texts(manifest: Manifest) -> dict[str, list[str]]:
    """Held-out texts per language; a pair gives both sides."""
    result: dict[str, list[str]] = {}
    for held in manifest.held_out:
        texts = (held.text, *held.pair.split(SEPARATOR))
        result.setdefault(held.language, []).extend(text for text in texts if text)
    return result


def rows(manifest: Manifest, cutter: Cutter, sequence_length: int, seed: int) -> pa.Table:
    """Packed rows of every held-out document, language after language."""
    tables: list[pa.Table] = []
    for number, language in enumerate(manifest.languages):
        held = [entry for entry in manifest.held_out if entry.language == language]
        if held:
            window = Window(
                _FIRST_WINDOW + number,
                [entry.text for entry in held],
                [entry.pair for entry in held],
                [number] * len(held),
                list(range(len(held))),
            )
            tables.append(packing.pack(window, cutter, sequence_length, seed))
    return pa.concat_tables(tables) if tables else packed_schema(sequence_length).empty_table()


def tokens_per_document(manifest: Manifest, table: pa.Table) -> np.ndarray:
    """Mean tokens of a language's training documents (L,), told by the held-out ones; 0 for a language without any.

    Held-out documents tell the tokens of a character, and the manifest the characters of a document: texts that stand
    in the corpus many times are never held out, and may be shorter.

    Args:
        manifest: with L languages.
        table: what `rows` has made of it.
    """
    L = len(manifest.languages)
    languages_D = np.concatenate(table.column("languages").to_pylist() or [[]]).astype(np.int64)
    lengths_D = np.concatenate(table.column("lengths").to_pylist() or [[]])
    tokens_L = np.bincount(languages_D, weights=lengths_D, minlength=L)
    held: Counter[str] = Counter()
    for entry in manifest.held_out:
        held[entry.language] += len(entry.text) + len(entry.pair)
    characters, documents = manifest.characters(), manifest.documents()
    means_L = np.array([characters[name] / documents[name] for name in manifest.languages])
    held_L = np.array([max(held[name], 1) for name in manifest.languages])
    return np.asarray(tokens_L / held_L * means_L)


def batches(table: pa.Table, micro_batch_size: int) -> list[PackedBatch]:
    """All rows in micro-batches; the last may be smaller."""
    return [
        packing.unpack(table.slice(start, micro_batch_size))
        for start in range(0, len(table), micro_batch_size)
    ]


def row_languages(batch: PackedBatch) -> np.ndarray:
    """Language number of each row (B,)."""
    languages_B = np.zeros(len(batch), dtype=np.int64)
    languages_B[batch.batch_D] = batch.languages_D
    return languages_B
