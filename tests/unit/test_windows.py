"""Windows are a pure function of their number, and an id leads back to the text on disk."""

import gzip
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlray.access import StorageError
from mlray.config import Corpus, Source, Storage
from mlray.corpus.manifest import Manifest
from mlray.corpus.mixture import Mixture
from mlray.corpus.windows import WindowReader

SETTINGS = Storage()
WINDOW_ROWS = 48
BuildManifest = Callable[[tuple[Source, ...], Corpus], Manifest]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, build_manifest: BuildManifest) -> Manifest:
    """Three languages in all formats; every fifth record is bad, and two languages share a file."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = ["" if number % 5 == 2 else f"Zeile {number}" for number in range(100)]
    (folder / "de.txt").write_text("\n".join(lines), encoding="utf-8")
    mixed = [
        {"text": None if number % 5 == 4 else f"mixed {number}", "lang": ("de", "fr", "ja")[number % 3]}
        for number in range(90)
    ]
    packed = "".join(json.dumps(row) + "\n" for row in mixed).encode()
    (folder / "mixed.jsonl.gz").write_bytes(gzip.compress(packed))
    texts = [None if number % 5 == 0 else f"ligne {number}" for number in range(64)]
    table = pa.table({"text": texts, "fr": [f"paire {number}" for number in range(64)]})
    pq.write_table(table, folder / "fr.parquet", row_group_size=10)
    named = (
        Source(uri=f"{folder}/de.txt"),
        Source(uri=f"{folder}/mixed.jsonl.gz", language="column:lang"),
        Source(uri=f"{folder}/fr.parquet", pair="fr"),
    )
    manifest = build_manifest(named, Corpus(validation_rows=3))
    assert len(manifest.held_out) == 8  # 3 + 3, and a tenth of 24 documents
    return manifest


def reader_of(manifest: Manifest, *, alpha: float = 0.3, seed: int = 4) -> WindowReader:
    return WindowReader(manifest, Mixture(manifest, alpha, WINDOW_ROWS, seed), 1000, SETTINGS)


def test_window_does_not_depend_on_what_was_read_before(corpus: Manifest) -> None:
    reader = reader_of(corpus)
    in_order = [reader.read(number) for number in range(6)]
    assert [reader_of(corpus).read(number) for number in range(6)] == in_order
    assert [reader.read(number) for number in (5, 0, 3, 3, 1)] == [in_order[i] for i in (5, 0, 3, 3, 1)]


def test_reader_that_was_sent_elsewhere_reads_the_same(corpus: Manifest) -> None:
    reader = reader_of(corpus)
    expected = [reader.read(number) for number in range(3)]
    sent = pickle.loads(pickle.dumps(reader))
    assert [sent.read(number) for number in range(3)] == expected


def text_on_disk(manifest: Manifest, document: int) -> tuple[str, str]:
    """Text and translation of a document, found by its id without the reader."""
    chunk, row = manifest.chunks[document >> 32].chunk, document & 0xFFFFFFFF
    path = Path(chunk.file.uri)
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8").split("\n")[row], ""
    if path.suffix == ".gz":
        return json.loads(gzip.decompress(path.read_bytes()).decode().split("\n")[row])["text"], ""
    cells = pq.ParquetFile(path).read_row_group(chunk.start).slice(row, 1).to_pylist()[0]
    return cells["text"], cells["fr"]


def test_id_leads_to_the_text_on_disk(corpus: Manifest) -> None:
    reader = reader_of(corpus)
    held_out = {entry.text for entry in corpus.held_out}
    formats = set()
    for number in range(3):
        window = reader.read(number)
        assert window.number == number
        assert len(window.document) == WINDOW_ROWS
        for text, pair, document in zip(window.text, window.pair, window.document, strict=True):
            assert (text, pair) == text_on_disk(corpus, document)
            assert text not in held_out
            formats.add(Path(corpus.chunks[document >> 32].chunk.file.uri).suffix)
    assert formats == {".txt", ".gz", ".parquet"}


def test_language_of_a_document_is_its_own(corpus: Manifest) -> None:
    reader = reader_of(corpus)
    found = set()
    for number in range(6):
        window = reader.read(number)
        for text, language in zip(window.text, window.language, strict=True):
            name = reader.mixture.languages[language]
            kind, place = text.split()
            found.add((kind, name))
            if kind == "mixed":
                assert name == ("de", "fr", "ja")[int(place) % 3]
    assert found == {("Zeile", "de"), ("ligne", "fr"), ("mixed", "de"), ("mixed", "fr"), ("mixed", "ja")}


def test_ids_are_unique_inside_an_epoch_and_an_epoch_is_complete(corpus: Manifest) -> None:
    reader = reader_of(corpus)
    total = corpus.documents()
    # Good records less held-out ones; a third of 90 mixed records is of each language, a fifth of them bad.
    assert total == {"de": 80 + 24 - 3, "fr": 51 + 24 - 3, "ja": 24 - 2}
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for number in range(12):
        window = reader.read(number)
        assert len(set(zip(window.language, window.document, strict=True))) <= WINDOW_ROWS
        for language, document in zip(window.language, window.document, strict=True):
            seen[language].append(document)
    for language, name in enumerate(reader.mixture.languages):
        complete, rest = divmod(len(seen[language]), total[name])
        counts = Counter(Counter(seen[language]).values())
        expected = {complete: total[name] - rest, complete + 1: rest}
        assert counts == {times: number for times, number in expected.items() if times and number}
        assert complete >= 1


def test_documents_of_a_window_are_shuffled_by_the_seed(corpus: Manifest) -> None:
    first, other = (reader_of(corpus, seed=seed).read(0) for seed in (4, 5))
    assert first.document != other.document
    assert first.language != sorted(first.language)
    # Languages come in no runs: far more neighbours differ than at the two borders of three sorted languages.
    assert sum(a != b for a, b in itertools.pairwise(first.language)) > 10


def test_file_with_fewer_documents_than_before_is_named(
    tmp_path: Path, build_manifest: BuildManifest
) -> None:
    path = tmp_path / "de.txt"
    lines = [f"Zeile {number}" for number in range(WINDOW_ROWS)]
    path.write_text("\n".join(lines), encoding="utf-8")
    manifest = build_manifest((Source(uri=str(path)),), Corpus(validation_rows=0))
    path.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(StorageError, match=f"^{path} holds fewer documents than when the manifest was built"):
        reader_of(manifest).read(0)


def test_reader_recovers_when_the_file_is_back(tmp_path: Path, build_manifest: BuildManifest) -> None:
    path = tmp_path / "de.txt"
    path.write_text("\n".join(f"Zeile {number}" for number in range(30)), encoding="utf-8")
    manifest = build_manifest((Source(uri=str(path)),), Corpus(validation_rows=0))
    reader = reader_of(manifest)
    path.rename(tmp_path / "away")
    with pytest.raises(StorageError, match=f"^{path}: "):
        reader.read(0)
    (tmp_path / "away").rename(path)
    assert reader.read(0) == reader_of(manifest).read(0)
