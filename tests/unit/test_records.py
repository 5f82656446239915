"""Records of a chunk: every bad one has a reason, every good neighbour and every position is kept."""

import gzip
import itertools
import json
import random
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlray.access import StorageError
from mlray.config import ConfigError, Source, Storage
from mlray.corpus import records, sources
from mlray.corpus.fields import Record
from mlray.corpus.lines import BrokenChunk, Chunk
from mlray.corpus.sources import SourceFile

SETTINGS = Storage()
MAX_CHARS = 1000


def describe(
    path: Path, *, pair: str | None = None, text: tuple[str, ...] = ("text",), language: str = "de"
) -> SourceFile:
    source = Source(uri=str(path), pair=pair, text=text, language=language)
    (file,) = sources.list_files((source,), SETTINGS)
    return file


def read(chunk: Chunk, max_chars: int = MAX_CHARS) -> list[Record]:
    return list(itertools.chain.from_iterable(records.read(chunk, max_chars, SETTINGS)))


def read_until_broken(chunk: Chunk) -> tuple[list[Record], str]:
    """What comes before a chunk breaks, and the reason."""
    found: list[Record] = []

    def drain() -> None:
        for batch in records.read(chunk, MAX_CHARS, SETTINGS):
            found.extend(batch)

    with pytest.raises(BrokenChunk) as caught:
        drain()
    return found, str(caught.value)


def read_file(file: SourceFile, max_chars: int = MAX_CHARS) -> list[Record]:
    (chunk,) = records.chunks(file, 1 << 30, SETTINGS)
    return read(chunk, max_chars)


def good(row: int, text: str, pair: str = "", language: str = "de") -> Record:
    return Record(row, language, text, pair, "")


def bad(row: int, reason: str, language: str = "de") -> Record:
    return Record(row, language, "", "", reason)


def damaged_strings(*values: bytes) -> pa.Array:
    """A string array whose bytes nobody checked."""
    return pa.array(values, pa.binary()).view(pa.string())


# ---- text and JSON lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        (b'{"text": "a\\u0000b"}', "NUL character"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": 5}', "not text but int"),
        (b'{"text": ["a", 5]}', "not text but list"),
        (b'{"text": {"de": "a"}}', "not text but dict"),
        (b'{"text": null}', "null"),
        (b'{"text": "  "}', "empty"),
        (b"", "empty"),
        (b"  \r", "empty"),
        (b'{"text": "a"', "not JSON"),
        (b"a,b,c", "not JSON"),
        (b"[" * 3000, "not JSON"),
        (b'{"text": "a", "n": ' + b"9" * 2900 + b"}", ""),
        (b"[1, 2]", "not a JSON object but list"),
        (b'"text"', "not a JSON object but str"),
        (b'{"body": "a"}', "no key 'text'"),
        (b'{"text": "' + b"a" * 1001 + b'"}', "longer than 1000 characters"),
        (b'{"text": "' + b"a" * 50_000 + b'"}', "longer than 1000 characters"),
    ],
)
def test_bad_json_line_keeps_its_neighbours(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "de.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    middle = bad(1, reason) if reason else good(1, "a")
    assert read_file(describe(path)) == [good(0, "before"), middle, good(2, "after")]


def test_endless_number_in_a_json_line_is_one_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "de.jsonl"
    path.write_bytes(b'{"text": "a", "n": ' + b"9" * 5000 + b'}\n{"text": "b"}\n')
    assert read_file(describe(path), 10_000) == [bad(0, "not JSON"), good(1, "b")]


def test_byte_order_mark_does_not_cost_the_first_json_record(tmp_path: Path) -> None:
    path = tmp_path / "de.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert read_file(describe(path)) == [good(0, "a"), good(1, "b")]


@pytest.mark.parametrize(
    "entry",
    [
        {"text": "日本語日本語日本語日"},  # 60 bytes as \uXXXX
        {"text": "🛒" * 10},  # 120 bytes as surrogate pairs
        {"text": "ten chars!", "id": "0123456789" * 20},
    ],
)
def test_limit_is_on_the_text_not_on_its_spelling(entry: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "de.jsonl"
    path.write_text(json.dumps(entry) + "\n", encoding="ascii")
    assert read_file(describe(path), 10) == [good(0, entry["text"])]


def test_limit_is_on_each_side_of_a_pair(tmp_path: Path) -> None:
    path = tmp_path / "ja-zh.tsv"
    path.write_text("日本語日本\t中文中文中\n", encoding="utf-8")
    assert read_file(describe(path, pair="tab", language="ja-zh"), 5) == [
        good(0, "日本語日本", "中文中文中", "ja-zh")
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"plain", good(1, "plain")),
        (b"  with space \r", good(1, "with space")),
        (b'{"text": "no JSON here"}', good(1, '{"text": "no JSON here"}')),
        (b"\xff", bad(1, "invalid UTF-8 at byte 0")),
        (b"a\x00b", bad(1, "NUL character")),
        (b"", bad(1, "empty")),
        (b"a" * 1001, bad(1, "longer than 1000 characters")),
        ("é".encode() * 1001, bad(1, "longer than 1000 characters")),
        (b"a" * 4003, bad(1, "longer than 1000 characters")),
        ("語".encode() * 1000, good(1, "語" * 1000)),
    ],
)
def test_text_line(line: bytes, expected: Record, tmp_path: Path) -> None:
    path = tmp_path / "de.txt"
    path.write_bytes(b"before\n" + line + b"\nafter")
    assert read_file(describe(path)) == [good(0, "before"), expected, good(2, "after")]


def test_long_line_is_never_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "de.txt"
    with path.open("wb") as file:
        file.writelines(b"x" * (1 << 20) for _ in range(32))
        file.write(b"\nafter\n")
    described = describe(path)
    tracemalloc.start()
    try:
        found = read_file(described)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [bad(0, "longer than 1000 characters"), good(1, "after")]
    assert peak < 8 << 20


def bytes_read() -> int:
    """Bytes that this process has read so far, by the count of the kernel."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"))[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads by /proc, which only Linux has")
@pytest.mark.parametrize("chunk_number", [0, 1])
def test_chunk_inside_a_long_line_is_not_read_to_its_end(chunk_number: int, tmp_path: Path) -> None:
    path = tmp_path / "de.json"  # such as one JSON array of a whole corpus, which is no JSON lines
    with path.open("wb") as file:
        file.writelines(b"x" * (1 << 20) for _ in range(32))
    chunk = records.chunks(describe(path), 1 << 20, SETTINGS)[chunk_number]
    before = bytes_read()
    found = read(chunk)
    assert bytes_read() - before < 8 << 20
    assert [record.reason for record in found] == ["longer than 1000 characters"][chunk_number:]


def test_tab_separated_pairs(tmp_path: Path) -> None:
    path = tmp_path / "de-en.tsv"
    path.write_bytes(b"Haus\thouse\r\nHaus\na\tb\tc\n\thouse\nHaus\t \nH\xc3\xb6hle\tcave\n")
    language = "de-en"
    assert read_file(describe(path, pair="tab", language="filename")) == [
        good(0, "Haus", "house", language),
        bad(1, "1 tab-separated columns instead of 2", language),
        bad(2, "3 tab-separated columns instead of 2", language),
        bad(3, "empty", language),
        bad(4, "empty", language),
        good(5, "Höhle", "cave", language),
    ]


def test_several_columns_and_lists_are_joined_by_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "de.jsonl"
    rows = [
        {"title": "T", "parts": ["a", "b"], "en": "E"},
        {"title": "T", "parts": "a", "en": "E"},
        {"title": None, "parts": ["a"], "en": "E"},
        {"title": "T", "parts": [], "en": "E"},
        {"title": "T", "parts": "a", "en": None},
        {"title": "T", "parts": "a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_file(describe(path, text=("title", "parts"), pair="en")) == [
        good(0, "T\na\nb", "E"),
        good(1, "T\na", "E"),
        bad(2, "null"),
        good(3, "T", "E"),
        bad(4, "null"),
        bad(5, "no key 'en'"),
    ]


def test_language_column(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(
        b'{"text": "a", "lang": "DE"}\n'
        b'{"text": "b", "lang": "zh_hant"}\n'
        b'{"text": "", "lang": "fr"}\n'
        b'{"text": "c", "lang": "german!"}\n'
        b'{"text": "d", "lang": null}\n'
        b'{"text": "e"}\n'
        b"broken\n"
    )
    assert read_file(describe(path, language="column:lang")) == [
        good(0, "a", language="de"),
        good(1, "b", language="zh-Hant"),
        bad(2, "empty", "fr"),
        bad(3, "no language tag in the language column", "und"),
        bad(4, "null", "und"),
        bad(5, "no key 'lang'", "und"),
        bad(6, "not JSON", "und"),
    ]


def in_chunks(file: SourceFile, chunk_bytes: int) -> list[Record]:
    """All records; inside each chunk rows count from 0."""
    found: list[Record] = []
    for chunk in records.chunks(file, chunk_bytes, SETTINGS):
        part = read(chunk)
        assert [record.row for record in part] == list(range(len(part)))
        found += part
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files each example of a property test overwrites."""
    return tmp_path_factory.mktemp("records")


@given(
    lines=st.lists(st.text("ab語", max_size=6), max_size=12),
    ending=st.sampled_from(["", "\n", "\n\n"]),
    chunk_bytes=st.integers(1, 40),
)
def test_chunks_of_a_text_file_give_every_line_once(
    lines: list[str], ending: str, chunk_bytes: int, scratch: Path
) -> None:
    content = "\n".join(lines) + ending
    path = scratch / "de.txt"
    path.write_text(content, encoding="utf-8")
    expected = content.removesuffix("\n").split("\n") if content else []
    found = in_chunks(describe(path), chunk_bytes)
    assert [record.text for record in found] == expected
    assert [record.reason for record in found] == ["" if line else "empty" for line in expected]


@pytest.fixture(scope="module")
def large_text(scratch: Path) -> tuple[Path, list[str]]:
    """3 MB of lines, so that chunks and lines lie across the blocks in which a file is read."""
    draw = random.Random(5)
    lines = [f"{number} " + "é" * draw.choice([1, 20, 400]) for number in range(10_000)]
    path = scratch / "fr.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path, lines


@pytest.mark.parametrize("chunk_bytes", [1 << 30, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 300_007])
def test_chunks_of_a_large_file_give_every_line_once(
    chunk_bytes: int, large_text: tuple[Path, list[str]]
) -> None:
    path, lines = large_text
    assert [record.text for record in in_chunks(describe(path), chunk_bytes)] == lines


def test_empty_files_have_no_records(tmp_path: Path) -> None:
    for name in ("de.txt", "de.jsonl", "de.txt.gz"):
        (tmp_path / name).write_bytes(b"")
        assert in_chunks(describe(tmp_path / name), 100) == []


# ---- compressed files


def test_compressed_files_are_one_chunk(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(3000)]
    content = "\n".join(lines).encode()
    (tmp_path / "de.txt.gz").write_bytes(gzip.compress(content[:7000]) + gzip.compress(content[7000:]))
    with pa.CompressedOutputStream(str(tmp_path / "de.txt.zst"), "zstd") as stream:
        stream.write(content)
    for name in ("de.txt.gz", "de.txt.zst"):
        (chunk,) = records.chunks(describe(tmp_path / name), 100, SETTINGS)
        assert read(chunk) == [good(row, line) for row, line in enumerate(lines)]


@pytest.fixture
def truncated(tmp_path: Path) -> tuple[Chunk, list[str]]:
    draw = random.Random(1)
    lines = [f"line {number} {draw.random()}" for number in range(3000)]
    path = tmp_path / "de.txt.gz"
    packed = gzip.compress("\n".join(lines).encode())
    path.write_bytes(packed[: len(packed) // 2])
    (chunk,) = records.chunks(describe(path), 100, SETTINGS)
    return chunk, lines


def test_truncated_gzip_gives_what_comes_before(truncated: tuple[Chunk, list[str]]) -> None:
    chunk, lines = truncated
    found, reason = read_until_broken(chunk)
    assert 1000 < len(found) < 2000
    assert found == [good(row, line) for row, line in enumerate(lines[: len(found)])]
    assert reason.startswith("damaged gzip: ")


def test_what_is_no_gzip_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "de.txt.gz"
    path.write_bytes(b"plain text\nwith a wrong name\n")
    (chunk,) = records.chunks(describe(path), 100, SETTINGS)
    found, reason = read_until_broken(chunk)
    assert found == []
    assert reason.startswith("damaged gzip: ")


# ---- parquet


def write_parquet(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_chunks_are_row_groups(tmp_path: Path) -> None:
    texts = [f"row {number}" for number in range(10)]
    path = write_parquet(tmp_path / "de.parquet", {"id": range(10), "text": texts}, row_group_size=4)
    chunks = records.chunks(describe(path), 1, SETTINGS)
    assert [[record.text for record in read(chunk)] for chunk in chunks] == [texts[:4], texts[4:8], texts[8:]]
    assert [record.row for record in read(chunks[1])] == [0, 1, 2, 3]


def test_bad_parquet_rows_keep_their_neighbours(tmp_path: Path) -> None:
    texts = damaged_strings(b"first", b"\xff\xfe", b"a\x00b", b" ", b"x" * 1001, "größer".encode())
    texts = pa.concat_arrays([texts, pa.array([None, "last"])])
    path = write_parquet(tmp_path / "de.parquet", {"text": texts})
    assert read_file(describe(path)) == [
        good(0, "first"),
        bad(1, "invalid UTF-8 at byte 0"),
        bad(2, "NUL character"),
        bad(3, "empty"),
        bad(4, "longer than 1000 characters"),
        good(5, "größer"),
        bad(6, "null"),
        good(7, "last"),
    ]


def test_bad_utf8_in_the_translation_is_one_bad_row(tmp_path: Path) -> None:
    pairs = damaged_strings(b"one", b"\xff", b"three")
    path = write_parquet(tmp_path / "de-en.parquet", {"text": ["eins", "zwei", "drei"], "en": pairs})
    assert read_file(describe(path, pair="en")) == [
        good(0, "eins", "one"),
        bad(1, "invalid UTF-8 at byte 0"),
        good(2, "drei", "three"),
    ]


def test_bad_utf8_in_the_language_is_one_bad_row(tmp_path: Path) -> None:
    tags = damaged_strings(b"de", b"\xff", b"fr")
    path = write_parquet(tmp_path / "mixed.parquet", {"text": ["eins", "zwei", "trois"], "lang": tags})
    assert read_file(describe(path, language="column:lang")) == [
        good(0, "eins"),
        bad(1, "invalid UTF-8 at byte 0", "und"),
        good(2, "trois", language="fr"),
    ]


def test_bad_utf8_in_a_list_is_one_bad_row(tmp_path: Path) -> None:
    parts = pa.ListArray.from_arrays([0, 2, 3, 4], damaged_strings(b"a", b"b", b"\xff", b"c"))
    path = write_parquet(tmp_path / "de.parquet", {"text": parts})
    assert read_file(describe(path)) == [good(0, "a\nb"), bad(1, "invalid UTF-8 at byte 0"), good(2, "c")]


@pytest.mark.parametrize(
    ("column", "reason"),
    [(pa.array([1]), "not text but int"), (pa.array([{"de": "a"}]), "not text but dict")],
)
def test_parquet_column_of_another_type(column: pa.Array, reason: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "de.parquet", {"text": column})
    assert read_file(describe(path)) == [bad(0, reason)]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_text_in_every_string_type(kind: pa.DataType, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "de.parquet", {"text": pa.array(["größer", "über"]).cast(kind)})
    assert read_file(describe(path)) == [good(0, "größer"), good(1, "über")]


def test_parquet_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "de.parquet", {"body": ["a"], "id": [1]})
    (chunk,) = records.chunks(describe(path), 1, SETTINGS)
    assert read_until_broken(chunk) == ([], "no column 'text'; the file has body, id")


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"this is no parquet file at all", b"PAR1" + b"\xff" * 40 + b"PAR1"]
)
def test_what_is_no_parquet_file_is_broken(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "de.parquet"
    path.write_bytes(content)
    with pytest.raises(BrokenChunk, match=r"^not a readable parquet file: [^\n]+$"):
        records.chunks(describe(path), 1, SETTINGS)


def write_row_groups(path: Path, **options: object) -> list[str]:
    """Three row groups of 5,000 texts, many pages each."""
    draw = random.Random(2)
    texts = [f"document {number} {draw.random()}" for number in range(15_000)]
    layout = {"use_dictionary": False, "row_group_size": 5000, "data_page_size": 4096}
    write_parquet(path, {"text": texts}, **layout, **options)
    return texts


def check_second_row_group_broken(path: Path, texts: list[str]) -> None:
    first, damaged, last = records.chunks(describe(path), 1, SETTINGS)
    assert [record.text for record in read(first)] == texts[:5000]
    assert [record.text for record in read(last)] == texts[10_000:]
    found, reason = read_until_broken(damaged)
    assert 2000 < len(found) < 5000
    assert found == [good(row, text) for row, text in enumerate(texts[5000 : 5000 + len(found)])]
    assert reason.startswith("damaged parquet page: ")


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_damaged_parquet_page_costs_only_what_follows_in_its_row_group(
    compression: str, tmp_path: Path
) -> None:
    path = tmp_path / "de.parquet"
    texts = write_row_groups(path, compression=compression)
    column = pq.read_metadata(path).row_group(1).column(0)
    place = column.data_page_offset + column.total_compressed_size * 3 // 4
    content = bytearray(path.read_bytes())
    content[place : place + 5000] = b"\xff" * 5000
    path.write_bytes(content)
    check_second_row_group_broken(path, texts)


def test_checksum_of_a_parquet_page_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "de.parquet"
    texts = write_row_groups(path, compression="none", write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"document 9000 ", b"dokument 9000 "))
    check_second_row_group_broken(path, texts)


# ---- positions


@pytest.fixture(scope="module")
def long_chunks(scratch: Path) -> list[tuple[Chunk, list[Record]]]:
    """Chunks of 5,000 rows (several batches), every seventh of them bad, with all of their records."""
    texts = ["" if row % 7 == 3 else f"row {row}" for row in range(5000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (scratch / "long.jsonl").write_bytes(lines)
    (scratch / "long.jsonl.gz").write_bytes(gzip.compress(lines))
    write_parquet(scratch / "long.parquet", {"text": texts})
    found = []
    for name in ("long.jsonl", "long.jsonl.gz", "long.parquet"):
        (chunk,) = records.chunks(describe(scratch / name), 1 << 30, SETTINGS)
        found.append((chunk, read(chunk)))
    return found


def test_positions_are_the_raw_rows(long_chunks: Sequence[tuple[Chunk, list[Record]]]) -> None:
    for _, full in long_chunks:
        assert [record.row for record in full] == list(range(5000))
        assert [record.row for record in full if record.reason] == list(range(3, 5000, 7))
        assert [record.text for record in full if not record.reason] == [
            f"row {row}" for row in range(5000) if row % 7 != 3
        ]


def test_file_that_is_gone_is_no_damage(tmp_path: Path) -> None:
    write_parquet(tmp_path / "de.parquet", {"text": ["a"]})
    (tmp_path / "fr.txt").write_text("a\n", encoding="utf-8")
    for name in ("de.parquet", "fr.txt"):
        file = describe(tmp_path / name)
        (chunk,) = records.chunks(file, 100, SETTINGS)
        (tmp_path / name).unlink()
        with pytest.raises(StorageError, match=f"^{tmp_path}/{name}: "):
            read(chunk)


# ---- two files, line by line


def aligned(folder: Path, text: bytes, pair: bytes) -> Chunk:
    (folder / "a.en.gz").write_bytes(gzip.compress(text))
    (folder / "a.de").write_bytes(pair)
    source = Source(
        uri=str(folder / "a.en.gz"), pair_uri=str(folder / "a.de"), language="en-de", format="text"
    )
    (file,) = sources.list_files((source,), SETTINGS)
    (chunk,) = records.chunks(file, 4, SETTINGS)  # smaller than the files: line k must stay beside line k
    return chunk


def test_lines_of_two_files_are_pairs_and_a_bad_one_keeps_its_neighbours(tmp_path: Path) -> None:
    chunk = aligned(
        tmp_path,
        b"one\r\n\xff\nthree\n\nfive\n" + b"x" * 200_000 + b"\nseven",
        b"eins\nzwei\ndrei\nvier\n\nlang\nsieben",
    )
    assert read(chunk) == [
        good(0, "one", "eins", "en-de"),
        bad(1, "invalid UTF-8 at byte 0", "en-de"),
        good(2, "three", "drei", "en-de"),
        bad(3, "empty", "en-de"),
        bad(4, "empty", "en-de"),
        bad(5, "longer than 1000 characters", "en-de"),
        good(6, "seven", "sieben", "en-de"),
    ]


@pytest.mark.parametrize(("text", "pair"), [(b"one\ntwo\n", b"eins\n"), (b"one\n", b"eins\nzwei\n")])
def test_files_of_different_length_are_broken_where_the_shorter_ends(
    tmp_path: Path, text: bytes, pair: bytes
) -> None:
    found, reason = read_until_broken(aligned(tmp_path, text, pair))
    assert found == [good(0, "one", "eins", "en-de")]
    assert re.fullmatch(r"\S+/a\.en\.gz and \S+/a\.de have different numbers of lines", reason)


def test_pair_uri_needs_one_text_file_and_a_direction(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n")
    (tmp_path / "b.txt").write_bytes(b"eins\n")
    for values in ({"language": "en"}, {"language": "en-de", "format": "jsonl"}, {"pair_uri": str(tmp_path)}):
        wanted = {"uri": f"{tmp_path}/a.txt", "pair_uri": f"{tmp_path}/b.txt", "language": "en-de", **values}
        with pytest.raises(ConfigError, match=r"pair_uri takes one text file beside one text file"):
            sources.list_files((Source.model_validate(wanted),), SETTINGS)
