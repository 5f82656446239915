"""Which files a source holds, how each is read, and which language its name tells."""

from pathlib import Path

import pytest

from mlray.access import StorageError
from mlray.config import ConfigError, Source, Storage
from mlray.corpus import sources
from mlray.corpus.sources import SourceFile


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def only(folder: Path, name: str, source: Source) -> SourceFile:
    """The description of a new file below the root of a source."""
    touch(folder, name)
    (found,) = sources.list_files((source,), Storage())
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("de.parquet", ("parquet", None)),
        ("de.pq", ("parquet", None)),
        ("de.jsonl", ("jsonl", None)),
        ("de.ndjson.gz", ("jsonl", "gzip")),
        ("de.json.zst", ("jsonl", "zstd")),
        ("de.txt", ("text", None)),
        ("de.TXT", ("text", None)),
        ("de.text.gz", ("text", "gzip")),
        ("de.tsv.zst", ("text", "zstd")),
        ("de.part-0.txt", ("text", None)),
    ],
)
def test_name_tells_format_and_codec(name: str, expected: tuple[str, str | None], tmp_path: Path) -> None:
    found = only(tmp_path, name, Source(uri=str(tmp_path)))
    assert (found.format, found.codec) == expected
    assert found.language == "de"


def test_format_that_is_set_wins_over_the_name(tmp_path: Path) -> None:
    found = only(tmp_path, "de.log.gz", Source(uri=str(tmp_path), format="text"))
    assert (found.format, found.codec) == ("text", "gzip")


def test_file_carries_what_reading_needs(tmp_path: Path) -> None:
    source = Source(uri=str(tmp_path), text=("title", "body"), pair="translation", language="de-en")
    found = only(tmp_path, "a.jsonl", source)
    assert found == SourceFile(
        uri=f"{tmp_path}/a.jsonl",
        size=1,
        etag=found.etag,
        format="jsonl",
        codec=None,
        columns=("title", "body"),
        pair="translation",
        language="de-en",
        language_column=None,
    )
    assert found.etag


@pytest.mark.parametrize(
    ("rule", "name", "language", "column"),
    [
        ("filename", "zh_hant.txt.gz", "zh-Hant", None),
        ("filename", "sub/pt-BR.train.jsonl", "pt-BR", None),
        ("FR", "anything.txt", "fr", None),
        ("column", "a.jsonl", None, "language"),
        ("column:lang", "a.jsonl", None, "lang"),
        ("partition", "lang=sr_latn/a.txt", "sr-Latn", None),
        ("partition", "language=de/day=01/a.txt", "de", None),
        ("partition:lang", "day=01/lang=ja/a.txt", "ja", None),
        ("partition:lang", "lang=pt%2DBR/a.txt", "pt-BR", None),
    ],
)
def test_language_rules(
    rule: str, name: str, language: str | None, column: str | None, tmp_path: Path
) -> None:
    found = only(tmp_path, name, Source(uri=str(tmp_path), language=rule))
    assert (found.language, found.language_column) == (language, column)


@pytest.mark.parametrize(
    ("rule", "name", "tag"),
    [
        ("filename", "train-00001.txt", "train-00001"),
        ("partition", "a.txt", ""),
        ("partition:lang", "language=de/a.txt", ""),
        ("german", "a.txt", "german"),
    ],
)
def test_name_without_language_is_an_error(rule: str, name: str, tag: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        only(tmp_path, name, Source(uri=str(tmp_path), language=rule))
    assert str(caught.value).startswith(f"{tmp_path}/{name}: no language in {tag!r}")
    assert "column:<name>" in str(caught.value)


@pytest.mark.parametrize("name", ["README", "de.xml", "de.txt.bz2"])
def test_unknown_format_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown file type; set sources\[\]\.format"):
        only(tmp_path, name, Source(uri=str(tmp_path), language="de"))


def test_compressed_parquet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="parquet compresses inside"):
        only(tmp_path, "de.parquet.gz", Source(uri=str(tmp_path)))


def test_files_of_all_sources_are_ordered_by_name_whatever_the_order_of_sources(tmp_path: Path) -> None:
    touch(tmp_path, "b/de.txt", "b/fr.txt", "b/_SUCCESS", "a/en.jsonl", "c/ja.txt")
    named = tuple(Source(uri=f"{tmp_path}/{part}") for part in ("c/ja.txt", "b", "a/"))
    expected = [f"{tmp_path}/{name}" for name in ("a/en.jsonl", "b/de.txt", "b/fr.txt", "c/ja.txt")]
    assert [file.uri for file in sources.list_files(named, Storage())] == expected
    assert [file.uri for file in sources.list_files(named[::-1], Storage())] == expected


def test_uri_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = only(tmp_path, "corpus/de.txt", Source(uri="corpus"))
    assert found.uri == f"{tmp_path}/corpus/de.txt"


def test_no_sources_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"^corpus\.sources is empty; name at least one, e\.g\. "):
        sources.list_files((), Storage())


def test_empty_source_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "full/de.txt")
    named = (Source(uri=f"{tmp_path}/full"), Source(uri=f"{tmp_path}/none"))
    with pytest.raises(StorageError, match=f"^no files at {tmp_path}/none$"):
        sources.list_files(named, Storage())


def test_a_file_that_two_sources_name_is_read_once_and_belongs_to_the_first(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.jsonl")
    first, second = (
        Source(uri=str(tmp_path / "b.jsonl"), language="de"),
        Source(uri=str(tmp_path), language="de"),
    )
    found = sources.list_files((first, second), Storage())
    assert [(Path(file.uri).name, file.source) for file in found] == [("a.jsonl", 1), ("b.jsonl", 0)]
