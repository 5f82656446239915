"""CSV, TSV and CoNLL: every record is read or has a reason, and its neighbours are kept."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

from mlray.config import ConfigError, Source, Storage
from mlray.corpus import sources
from mlray.corpus.fields import Record
from mlray.corpus.lines import Chunk
from tests.unit.test_records import bad, good, read_file, read_until_broken

SETTINGS = Storage()


def listed(path: Path, **values: object) -> sources.SourceFile:
    (file,) = sources.list_files(
        (Source.model_validate({"uri": str(path), "language": "de", **values}),), SETTINGS
    )
    return file


def test_csv_cells_may_hold_separators_quotes_and_line_breaks(tmp_path: Path) -> None:
    rows = [
        "\ufeffid,text,label",
        '1,"eins, zwei",a',
        '2,"er sagte ""ja""\nund ging",b',
        "3,drei",
        "4,,c",
        "5,fünf,d",
    ]
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress("\r\n".join(rows).encode()))
    file = listed(tmp_path / "x.csv.gz", pair="label")
    assert read_file(file) == [
        good(0, "eins, zwei", "a"),
        good(1, 'er sagte "ja"\nund ging', "b"),
        bad(2, "2 columns instead of 3"),
        bad(3, "empty"),
        good(4, "fünf", "d"),
    ]


def test_a_file_of_two_sets_is_read_in_part_and_the_shares_stay(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\n" + "".join(f"Satz {i}\n" for i in range(300)), encoding="utf-8")
    whole, half = (0.0, 1.0), (0.0, 0.5)
    for part in (whole, half):
        expected = read_file(listed(tmp_path / "x.csv", part=part))
        cut = [
            read_file(listed(tmp_path / "x.csv", part=part, rows=rows))
            for rows in ((0, 120), (120, 121), (121, 999))
        ]
        assert [record for records in cut for record in records] == expected
        assert {record.row for record in cut[0]} <= set(range(120))
    file = listed(tmp_path / "x.csv", part=half, rows=(5, 9))
    assert sources.SourceFile.of(json.loads(json.dumps(asdict(file)))) == file
    for rows, reason in (((9, 9), "holds no row"), ((-1, 3), "greater than or equal to 0")):
        with pytest.raises((ConfigError, ValidationError), match=reason):
            listed(tmp_path / "x.csv", rows=rows)
    (tmp_path / "x.txt").write_text("Satz\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="rows is for csv, tsv and conll"):
        listed(tmp_path / "x.txt", rows=(0, 1))


def test_tsv_language_column_and_bad_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(b"lang\ttext\tlabel\nfr\tun\t1\nde\t\xff\t2\n\xe4\tx\t3\nde\tdrei\t0\n")
    file = listed(tmp_path / "x.tsv", format="tsv", pair="label", language="column:lang")
    assert read_file(file) == [
        Record(0, "fr", "un", "1", ""),
        bad(1, "invalid UTF-8", "und"),
        bad(2, "invalid UTF-8", "und"),
        Record(3, "de", "drei", "0", ""),
    ]


CONLL = """# id = 1
# intent = weather/find
1\tRegnet\tx\tO
2\tes\tx\tO

# intent = alarm/set
1\tWeck\tx\tO
2\tmich\tx\tB-who
1\tWeiter\tx\tO
# a comment that belongs to no sentence's start
2\tso\tx\tO


1\tkurz
2\tlang\tx\tO
"""


def test_conll_words_and_tags_stay_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "x.conllu").write_text(CONLL, encoding="utf-8")
    assert read_file(listed(tmp_path / "x.conllu", text="1", pair="3")) == [
        good(0, "Regnet es", "O O"),
        good(1, "Weck mich", "O B-who"),
        good(2, "Weiter so", "O O"),
        bad(3, "a word without column 3; columns are apart by tabs"),
    ]
    assert read_file(listed(tmp_path / "x.conllu", text="1", pair="intent")) == [
        good(0, "Regnet es", "weather/find"),
        good(1, "Weck mich", "alarm/set"),
        bad(2, "no line '# intent = ...' before the sentence"),
        bad(3, "no line '# intent = ...' before the sentence"),
    ]


CONLLU = """\
# text = Wir gehen zum Haus .
1\tWir\tPRON
2\tgehen\tVERB
3-4\tzum\t_
3\tzu\tADP
4\tdem\tDET
5\tHaus\tNOUN
5.1\tgehen\tVERB

1\ta\tX
2\t\ufeff\tX

"""


def test_the_lines_of_conll_that_are_no_words_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.conllu").write_text(CONLLU, encoding="utf-8")
    assert read_file(listed(tmp_path / "x.conllu", text="1", pair="2")) == [
        good(0, "Wir gehen zu dem Haus", "PRON VERB ADP DET NOUN"),
        bad(1, "a word without column 1; columns are apart by tabs"),
    ]
    (tmp_path / "y.conll").write_text("-DOCSTART-\tO\n\n1-2\tO\nBayern\tB-ORG\n\na O\n", encoding="utf-8")
    assert read_file(listed(tmp_path / "y.conll", text="0", pair="1")) == [
        good(0, "1-2 Bayern", "O B-ORG"),
        bad(1, "a word without column 1; columns are apart by tabs"),
    ]


def test_a_word_that_is_a_number_begins_no_sentence(tmp_path: Path) -> None:
    text = "1\tO\n:\tO\n1\tO\ngegen\tO\nBayern\tB-ORG\n"
    (tmp_path / "x.conll").write_text(text, encoding="utf-8")
    assert read_file(listed(tmp_path / "x.conll", text="0", pair="1")) == [
        good(0, "1 : 1 gegen Bayern", "O O O O B-ORG")
    ]


def test_missing_column_and_damage_are_told(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,body\n1,a\n", encoding="utf-8")
    file = listed(tmp_path / "x.csv")
    assert read_until_broken(Chunk(file, 0, file.size)) == ([], "no column 'text'; the file has id, body")
    body = gzip.compress(b"text\n" + b"\n".join(b"line %d" % i for i in range(20_000)))
    (tmp_path / "y.csv.gz").write_bytes(body[: len(body) // 2])
    file = listed(tmp_path / "y.csv.gz")
    found, reason = read_until_broken(Chunk(file, 0, file.size))
    assert reason.startswith("damaged gzip: ")
    assert found[:2] == [good(0, "line 0"), good(1, "line 1")]


def test_files_and_folders_name_what_is_meant(tmp_path: Path) -> None:
    for language in ("de", "fr"):
        (tmp_path / language).mkdir()
        for part in ("train", "val"):
            (tmp_path / language / f"{part}.conllu").write_text("1\ta\tO\n", encoding="utf-8")
    source = Source(uri=str(tmp_path), files="*/train.conllu", language="folder", text="1", pair="2")
    files = sources.list_files((source,), SETTINGS)
    assert [(Path(file.uri).name, file.language) for file in files] == [
        ("train.conllu", "de"),
        ("train.conllu", "fr"),
    ]
    with pytest.raises(ConfigError, match="no file matches"):
        sources.list_files((source.model_copy(update={"files": "*.txt"}),), SETTINGS)
