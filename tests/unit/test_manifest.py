"""The manifest: exact counts, and held-out texts that no training row repeats."""

import gzip
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlray.access import StorageError
from mlray.config import ConfigError, Corpus, Source, Storage
from mlray.corpus import manifest as manifests
from mlray.corpus import records, scan, sources
from mlray.corpus.manifest import Manifest, Refused

SETTINGS = Storage()
BuildManifest = Callable[[tuple[Source, ...], Corpus], Manifest]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def all_rows(manifest: Manifest) -> list[tuple[str, str, bool]]:
    """(language, text, is it held out?) of every good row, read from the files again."""
    found = []
    for entry in manifest.chunks:
        held = {part.language: set(part.held_out) for part in entry.parts}
        for record in itertools.chain.from_iterable(records.read(entry.chunk, 1000, SETTINGS)):
            if not record.reason:
                found.append((record.language, record.text, record.row in held[record.language]))
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, build_manifest: BuildManifest) -> tuple[Path, Manifest]:
    """Text, JSON lines and parquet in four languages; what is in them is counted by hand in the tests."""
    folder = tmp_path_factory.mktemp("mixed")
    write_lines(folder / "text" / "de.txt", ["eins", "zwei", "", "drei\x00", "größer"])
    rows = [
        {"text": text, "lang": tag}
        for text, tag in [("un", "fr"), ("vier", "de"), ("trois", "fr"), ("?", "!")]
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "oops\n"
    (folder / "mixed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pairs = {"text": ["Haus", "Tür", "Dach", None], "en": ["house", "door", "roof", "x"]}
    pq.write_table(pa.table(pairs), folder / "pairs.parquet", row_group_size=2)
    (folder / "fr.parquet").write_bytes(b"no parquet")
    named = (
        Source(uri=f"{folder}/text"),
        Source(uri=f"{folder}/mixed.jsonl.gz", language="column:lang"),
        Source(uri=f"{folder}/pairs.parquet", pair="en", language="de-en"),
        Source(uri=f"{folder}/fr.parquet"),
    )
    return folder, build_manifest(named, Corpus(validation_rows=0))


def test_documents_and_characters_are_counted_per_language(mixed: tuple[Path, Manifest]) -> None:
    _, manifest = mixed
    assert manifest.languages == ["de", "de-en", "fr"]
    assert manifest.documents() == {"de": 4, "de-en": 3, "fr": 2}
    # eins zwei größer vier; Haus house Tür door Dach roof; un trois
    assert manifest.characters() == {"de": 18, "de-en": 24, "fr": 7}
    assert manifest.held_out == ()


def test_part_sizes_name_the_chunks_of_a_language(mixed: tuple[Path, Manifest]) -> None:
    _, manifest = mixed
    for language, expected in {
        "de": [("mixed.jsonl.gz", 0, 1), ("de.txt", 0, 3)],
        "de-en": [("pairs.parquet", 0, 2), ("pairs.parquet", 1, 1)],
        "fr": [("mixed.jsonl.gz", 0, 2)],
    }.items():
        numbers, sizes = manifests.part_sizes(manifest, language)
        chunks = [manifest.chunks[number].chunk for number in numbers]
        found = [(Path(chunk.file.uri).name, chunk.start) for chunk in chunks]
        assert [(*place, size) for place, size in zip(found, sizes, strict=True)] == expected


def test_refused_records_are_counted_and_placed(mixed: tuple[Path, Manifest]) -> None:
    folder, manifest = mixed
    counts = manifest.refused_counts()
    reasons = {
        reason: count for reason, count in counts.pop("fr").items() if reason.startswith("not a readable")
    }
    assert list(reasons.values()) == [1]
    assert counts == {
        "de": {"empty": 1, "NUL character": 1},
        "de-en": {"null": 1},
        "und": {"no language tag in the language column": 1, "not JSON": 1},
    }
    assert Refused(f"{folder}/pairs.parquet", "row 1 from row group 1", "de-en", "null") in manifest.refused
    assert Refused(f"{folder}/text/de.txt", "row 2", "de", "empty") in manifest.refused
    assert len(manifest.refused) == 6


def test_damaged_rest_of_a_file_is_refused_once(tmp_path: Path, build_manifest: BuildManifest) -> None:
    content = gzip.compress("".join(f"Zeile {number}\n" for number in range(20)).encode())
    (tmp_path / "de.txt.gz").write_bytes(content)
    (tmp_path / "fr.txt.gz").write_bytes(content[:-20])
    manifest = build_manifest((Source(uri=str(tmp_path)),), Corpus(validation_rows=0))
    assert manifest.documents()["de"] == 20
    (refused,) = manifest.refused
    assert refused.uri == f"{tmp_path}/fr.txt.gz"
    assert refused.language == "fr"
    assert refused.reason.startswith("damaged gzip: ")


def test_held_out_documents_are_a_tenth_at_most(tmp_path: Path, build_manifest: BuildManifest) -> None:
    write_lines(tmp_path / "de.txt", [f"Satz {number}" for number in range(25)])
    write_lines(tmp_path / "en.txt", [f"Sentence {number}" for number in range(100)])
    write_lines(tmp_path / "fr.txt", [f"Phrase {number}" for number in range(9)])
    manifest = build_manifest((Source(uri=str(tmp_path)),), Corpus(validation_rows=4))
    assert Counter(entry.language for entry in manifest.held_out) == {"de": 2, "en": 4}
    assert manifest.documents() == {"de": 23, "en": 96, "fr": 9}
    rows = all_rows(manifest)
    assert len(rows) == 134
    assert sorted((language, text) for language, text, held in rows if held) == sorted(
        (entry.language, entry.text) for entry in manifest.held_out
    )


def test_characters_are_those_of_the_training_documents(
    tmp_path: Path, build_manifest: BuildManifest
) -> None:
    write_lines(tmp_path / "de.txt", [f"{number:02d}" + "x" * number for number in range(40)])
    manifest = build_manifest((Source(uri=str(tmp_path)),), Corpus(validation_rows=4))
    training = [text for _, text, held in all_rows(manifest) if not held]
    assert len(training) == 36
    assert manifest.characters() == {"de": sum(map(len, training))}


def test_held_out_documents_do_not_depend_on_where_they_lie(
    tmp_path: Path, build_manifest: BuildManifest
) -> None:
    lines = [f"Satz {number}" for number in range(60)]
    write_lines(tmp_path / "a" / "de.txt", lines)
    for part in range(3):
        write_lines(tmp_path / "b" / f"de.{part}.txt", lines[part::3][::-1])
    one, three = (
        build_manifest((Source(uri=f"{tmp_path}/{name}"),), Corpus(validation_rows=5)) for name in ("a", "b")
    )
    assert one.held_out == three.held_out
    assert len(one.held_out) == 5


def test_copy_of_a_held_out_text_in_another_file_is_held_out(
    tmp_path: Path, build_manifest: BuildManifest
) -> None:
    # By content hash: the first text comes twice, so it exceeds the budget of one row; the second is smallest
    # in the file b, and lies in the file a too.
    first, second, *others = sorted(
        (f"Satz {number}" for number in range(22)), key=lambda text: scan.content_hash(text, "")
    )
    write_lines(tmp_path / "a" / "de.txt", [first, *others[:10], second, first])
    write_lines(tmp_path / "b" / "de.txt", [second, *others[10:]])
    manifest = build_manifest((Source(uri=str(tmp_path)),), Corpus(validation_rows=1))
    training = {text for _, text, held in all_rows(manifest) if not held}
    assert [entry.text for entry in manifest.held_out if entry.text in training] == []


def test_late_copy_of_a_held_out_text_is_held_out(tmp_path: Path, build_manifest: BuildManifest) -> None:
    texts = sorted((f"Satz {number}" for number in range(30)), key=lambda text: scan.content_hash(text, ""))
    for copied in range(3):  # the copy comes when all other texts have been weighed
        write_lines(tmp_path / "de.txt", [*texts, texts[copied]])
        manifest = build_manifest((Source(uri=str(tmp_path)),), Corpus(validation_rows=3))
        training = {text for _, text, held in all_rows(manifest) if not held}
        assert manifest.held_out
        assert [entry.text for entry in manifest.held_out if entry.text in training] == []


@given(
    files=st.lists(st.lists(st.integers(0, 25), min_size=1, max_size=40), min_size=1, max_size=4),
    validation_rows=st.integers(0, 6),
)
def test_no_held_out_text_is_a_training_row(
    files: list[list[int]], validation_rows: int, build_manifest: BuildManifest
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, draws in enumerate(files):
            write_lines(Path(folder) / f"de.{number}.txt", [f"Satz {draw}" for draw in draws])
        manifest = build_manifest((Source(uri=folder),), Corpus(validation_rows=validation_rows))
        rows = all_rows(manifest)
    total = sum(map(len, files))
    held = [text for _, text, is_held in rows if is_held]
    training = [text for _, text, is_held in rows if not is_held]
    assert len(rows) == total
    assert len(held) <= min(validation_rows, total // 10)
    assert set(held) == {entry.text for entry in manifest.held_out}
    assert set(held) & set(training) == set()
    assert manifest.documents() == {"de": len(training)}


def test_both_sides_of_a_pair_are_held_out(tmp_path: Path, build_manifest: BuildManifest) -> None:
    write_lines(tmp_path / "de-en.tsv", [f"Satz {number}\tsentence {number}" for number in range(30)])
    manifest = build_manifest((Source(uri=str(tmp_path), pair="tab"),), Corpus(validation_rows=3))
    assert len(manifest.held_out) == 3
    for entry in manifest.held_out:
        assert entry.text.removeprefix("Satz ") == entry.pair.removeprefix("sentence ")


def test_save_and_load(mixed: tuple[Path, Manifest], tmp_path: Path, build_manifest: BuildManifest) -> None:
    folder, _ = mixed
    write_lines(tmp_path / "de-en.tsv", [f"Straße {number}\t街 {number}" for number in range(30)])
    named = (
        Source(uri=f"{folder}/pairs.parquet", pair="en", language="de-en"),
        Source(uri=f"{folder}/mixed.jsonl.gz", language="column:lang"),
        Source(uri=f"{tmp_path}/de-en.tsv", pair="tab"),
    )
    manifest = build_manifest(named, Corpus(validation_rows=3))
    assert manifest.held_out
    assert manifest.refused
    assert manifests.load(f"{tmp_path}/run/corpus", SETTINGS) is None
    manifests.save(manifest, f"{tmp_path}/run/corpus", SETTINGS)
    assert manifests.load(f"{tmp_path}/run/corpus", SETTINGS) == manifest


def test_quarantine_is_one_json_line_a_record(mixed: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = mixed
    manifests.save(manifest, str(tmp_path), SETTINGS)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 6
    assert {
        "uri": f"{folder}/text/de.txt",
        "position": "row 3",
        "language": "de",
        "reason": "NUL character",
    } in lines


def test_order_of_the_fragments_does_not_matter(tmp_path: Path) -> None:
    for name, count in (("de.0.txt", 30), ("de.1.txt", 20), ("fr.txt", 15)):
        write_lines(tmp_path / name, [f"{name[:2]} {number}" for number in range(count)] + [""])
    corpus = Corpus(validation_rows=3)
    files = sources.list_files((Source(uri=str(tmp_path)),), SETTINGS)
    fragments = [
        (number, scan.read_file(file, corpus.max_chars, corpus.validation_rows, SETTINGS))
        for number, file in enumerate(files)
    ]
    merged = [scan.merge(files, order, corpus, "") for order in itertools.permutations(fragments)]
    assert merged.count(merged[0]) == len(merged) == 6


def test_language_that_is_asked_for_must_be_there(tmp_path: Path, build_manifest: BuildManifest) -> None:
    write_lines(tmp_path / "de.txt", ["eins"])
    write_lines(tmp_path / "fr.txt", [""])
    source = Source(uri=str(tmp_path))
    manifest = build_manifest((source,), Corpus())
    manifests.check_languages(manifest, ["de"])
    for missing in ("fr", "ja"):
        with pytest.raises(ConfigError, match=rf"^corpus\.languages asks for '{missing}'.*found: de\b"):
            manifests.check_languages(manifest, ["de", missing])


def test_file_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "de.txt", ["eins"])
    files = sources.list_files((Source(uri=str(tmp_path)),), SETTINGS)
    fault = json.dumps({"fault": "s3://bucket/de.txt (endpoint AWS): AccessDenied"}).encode()
    with pytest.raises(StorageError, match=r"^s3://bucket/de.txt \(endpoint AWS\): AccessDenied$"):
        scan.merge(files, [(0, fault)], Corpus(), "")


def test_corpus_without_a_usable_record_is_an_error(tmp_path: Path, build_manifest: BuildManifest) -> None:
    write_lines(tmp_path / "de.jsonl", ['{"body": "wrong column"}', "", "no JSON"])
    write_lines(tmp_path / "fr.jsonl", [])
    with pytest.raises(ConfigError, match=r"^the corpus is empty: no usable record in 2 files; check "):
        build_manifest((Source(uri=str(tmp_path)),), Corpus())


def test_fingerprint_follows_files_and_limits_only(tmp_path: Path) -> None:
    write_lines(tmp_path / "de.txt", ["eins"])
    files = sources.list_files((Source(uri=str(tmp_path)),), SETTINGS)
    base = manifests.fingerprint(files, Corpus())
    assert manifests.fingerprint(files, Corpus(alpha=1.0, window_rows=99, sequence_length=64)) == base
    others = [
        manifests.fingerprint(files, Corpus(max_chars=99)),
        manifests.fingerprint(files, Corpus(validation_rows=1)),
        manifests.fingerprint([replace(files[0], etag="other")], Corpus()),
        manifests.fingerprint([replace(files[0], columns=("title",))], Corpus()),
        manifests.fingerprint([*files, *files], Corpus()),
    ]
    assert len({base, *others}) == 6


def test_the_digest_is_of_the_documents_wherever_they_lie(
    tmp_path: Path, build_manifest: BuildManifest
) -> None:
    lines = [f"Satz {number}" for number in range(30)]

    def digest(place: str, lines: list[str], limit: int = 3) -> str:
        (tmp_path / place).mkdir()
        path = write_lines(tmp_path / place / "de.txt", lines)
        if place == "packed":
            path.with_suffix(".txt.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        return build_manifest((Source(uri=str(path.parent)),), Corpus(validation_rows=limit)).digest

    base = digest("here", lines)
    assert digest("there", lines) == digest("packed", lines) == base
    others = [
        digest("fewer", lines[:-1]),
        digest("edited", ["Satz null", *lines[1:]]),
        digest("turned", lines[::-1]),
        digest("blank", ["", *lines]),  # refused, but all that follow have other rows
        digest("limit", lines, limit=2),
    ]
    assert len({base, *others}) == 6


def test_a_manifest_of_another_version_is_made_again(tmp_path: Path, build_manifest: BuildManifest) -> None:
    manifest = build_manifest((Source(uri=str(write_lines(tmp_path / "de.txt", ["eins"]))),), Corpus())
    manifests.save(manifest, str(tmp_path / "run"), SETTINGS)
    path = tmp_path / "run" / "manifest.json"
    body = json.loads(path.read_text("utf-8"))
    del body["form"]
    path.write_text(json.dumps(body), "utf-8")
    assert manifests.load(str(tmp_path / "run"), SETTINGS) is None


def test_a_file_beside_two_others_is_kept_apart(tmp_path: Path, build_manifest: BuildManifest) -> None:
    for language, lines in (("en", ["one", "two"]), ("de", ["eins", "zwei"]), ("fr", ["un", "deux"])):
        write_lines(tmp_path / f"x.{language}", lines)
    named = tuple(
        Source(
            uri=f"{tmp_path}/x.en", pair_uri=f"{tmp_path}/x.{other}", language=f"en-{other}", format="text"
        )
        for other in ("de", "fr")
    )
    manifest = build_manifest(named, Corpus(validation_rows=0))
    assert manifest.documents() == {"en-de": 2, "en-fr": 2}
    manifests.save(manifest, str(tmp_path / "run"), SETTINGS)
    assert manifests.load(str(tmp_path / "run"), SETTINGS) == manifest
