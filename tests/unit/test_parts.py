"""Parts of a source, label maps, tasks, dotted columns, whole files and questions: one description of a file each."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlray.config import ConfigError, Corpus, Source, Storage
from mlray.corpus import fields, manifest, records, scan, sources, squad
from mlray.corpus.cleaning import BadRecord
from mlray.corpus.fields import Record
from mlray.corpus.lines import BrokenChunk
from mlray.corpus.mixture import Mixture
from mlray.corpus.windows import WindowReader

SETTINGS = Storage()
SHARED = Path(__file__).parents[3] / "shared" / "data"


def read(*wanted: dict[str, Any]) -> list[Record]:
    """All records of sources, chunk after chunk."""
    files = sources.list_files(tuple(Source.model_validate(one) for one in wanted), SETTINGS)
    return [
        record
        for file in files
        for chunk in records.chunks(file, 1 << 30, SETTINGS)
        for batch in records.read(chunk, 10_000, SETTINGS)
        for record in batch
    ]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_parts_hold_each_row_once_with_its_raw_number(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": f"text {i}", "l": "de"} for i in range(500)]
    rows[7] = {"text": None, "l": "de"}
    uri = lines(tmp_path / "a.jsonl", rows)
    whole = read({"uri": uri, "language": "column:l"})
    test, train = (
        read({"uri": uri, "language": "column:l", "part": part}) for part in ((0.0, 0.1), (0.1, 1.0))
    )
    assert sorted(test + train) == sorted(whole)
    assert 25 <= len(test) <= 80  # a tenth of 500
    assert all(record.text == f"text {record.row}" for record in test)
    assert [record.row for record in train if record.reason] == [7]
    again = lines(tmp_path / "b.jsonl", list(reversed(rows)))
    elsewhere = read({"uri": again, "language": "column:l", "part": (0.0, 0.1)})
    assert {record.text for record in elsewhere} == {record.text for record in test}


def test_a_bad_row_belongs_to_the_part_of_its_text(tmp_path: Path) -> None:
    rows: list[Any] = [{"id": i % 7, "text": f"text {i}", "y": None if i % 2 else "a"} for i in range(300)]
    rows[6] = {"id": 6, "text": "no label at all"}
    uri = lines(tmp_path / "de.jsonl", rows)
    source = {"uri": uri, "pair": "y"}
    whole = read(source)
    reasons = {record.row: record.reason for record in whole if record.reason}
    assert len(reasons) == 151
    assert reasons[6] == "no key 'y'"
    halves = [read({**source, "part": part}) for part in ((0.0, 0.3), (0.3, 1.0))]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    for part, half in zip(((0.0, 0.3), (0.3, 1.0)), halves, strict=True):
        inside = [row for row in reasons if part[0] <= fields.share_of(rows[row]["text"]) < part[1]]
        assert [record.row for record in half if record.reason] == inside
    by_id = read({**source, "part": (0.0, 0.3), "part_by": "id"})
    share = {i: fields.share_of(str(i)) for i in range(7)}
    assert {record.row % 7 for record in by_id} == {i for i in range(7) if share[i] < 0.3}
    assert {record.key for record in by_id if not record.reason} <= {str(i) for i in range(7)}


def test_half_a_pair_that_cannot_be_read_leaves_the_row_in_its_part(tmp_path: Path) -> None:
    (tmp_path / "x.de").write_bytes(b"".join(b"Wort %d\n" % i for i in range(100)))
    (tmp_path / "x.en").write_bytes(b"\xff\n" + b"".join(b"word %d\n" % i for i in range(1, 100)))
    source = {
        "uri": f"{tmp_path}/x.de",
        "pair_uri": f"{tmp_path}/x.en",
        "language": "de-en",
        "format": "text",
    }
    share = fields.share_of("Wort 0")
    inside, outside = (read({**source, "part": part}) for part in ((share, 1.0), (0.0, share)))
    assert [record.reason for record in inside if record.reason] == ["invalid UTF-8 at byte 0"]
    assert not [record.reason for record in outside if record.reason]
    assert len(inside) + len(outside) == 100


def test_shares_are_even_over_the_unit_interval() -> None:
    shares = np.array([fields.share_of(str(i)) for i in range(4000)])
    counts = np.histogram(shares, bins=10, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 21.7  # chi-squared of 9 degrees of freedom, 1 %


def test_translations_of_a_row_share_a_part_where_a_column_says_so(tmp_path: Path) -> None:
    rows = [{"id": i, "text": {"en": f"word {i}", "de": f"Wort {i}"}} for i in range(300)]
    uri = lines(tmp_path / "a.jsonl", rows)

    def numbers(text: str, part: tuple[float, float]) -> set[str]:
        source = {"uri": uri, "text": text, "language": "de", "part_by": "id", "part": part}
        return {record.text.split()[1] for record in read(source)}

    assert numbers("text.en", (0.0, 0.2)) == numbers("text.de", (0.0, 0.2))
    assert not numbers("text.en", (0.0, 0.2)) & numbers("text.de", (0.2, 1.0))


def test_a_manifest_of_a_part_gives_windows_of_exactly_its_rows(tmp_path: Path) -> None:
    uri = lines(tmp_path / "de.jsonl", [{"text": f"text {i}"} for i in range(200)])
    source = Source(uri=uri, part=(0.25, 1.0))
    corpus = Corpus(sources=(source,), window_rows=16, validation_rows=10)
    files = sources.list_files(corpus.sources, SETTINGS)
    fragments = [(0, scan.read_file(files[0], 1000, 10, SETTINGS))]
    built = scan.merge(files, fragments, corpus, manifest.fingerprint(files, corpus))
    manifest.save(built, str(tmp_path / "run"), SETTINGS)
    loaded = manifest.load(str(tmp_path / "run"), SETTINGS)
    assert loaded == built
    mine = {record.text for record in read({"uri": uri, "part": (0.25, 1.0)})}
    held_out = {document.text for document in built.held_out}
    reader = WindowReader(loaded, Mixture.of(loaded, corpus, 0), 1000, SETTINGS)
    total = built.documents()["de"]
    seen = {text for number in range(-(-total // 16)) for text in reader.read(number).text}
    assert total == len(mine) - len(held_out)
    assert seen | held_out == mine
    assert not seen & held_out


def test_a_label_map_gives_two_files_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("label_en,label_ar\ncard arrival,وصول البطاقة\n", encoding="utf-8")
    uri = lines(tmp_path / "ar.jsonl", [{"text": "a", "y": "وصول البطاقة"}, {"text": "b", "y": "غير"}])
    good, bad = read({"uri": uri, "pair": "y", "label_map": f"{tmp_path}/map.csv:label_ar:label_en"})
    assert good.pair == "card_arrival"
    assert bad.reason == "the label 'غير' is not in the label map"


def test_a_label_map_names_each_tag(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("number,name\n0,O\n1,B-LOC\n", encoding="utf-8")
    rows = [{"text": ["im", "Wald"], "y": [0, 1]}, {"text": ["im", "Haus"], "y": [0, 7]}]
    uri = lines(tmp_path / "de.jsonl", rows)
    good, bad = read({"uri": uri, "pair": "y", "label_map": f"{tmp_path}/map.csv:number:name"})
    assert (good.text, good.pair) == ("im Wald", "O B-LOC")
    assert bad.reason == "the label '7' is not in the label map"


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("a,b\n1,2\n", "a", "is not of the form uri:from:to"),
        ("a,b\n1,2\n", "a:c", "has no column 'c', only a, b"),
        ("a,b\n1,2\n1,3\n", "a:b", "names '1' twice"),
        ("a,b\n1, \n", "a:b", "line 2: empty"),
        ("a,b\n1\n", "a:b", "line 2: null"),
    ],
)
def test_a_label_map_that_is_none_is_named(tmp_path: Path, text: str, spec: str, message: str) -> None:
    (tmp_path / "map.csv").write_text(text, encoding="utf-8")
    uri = lines(tmp_path / "ar.jsonl", [{"text": "a", "y": "1"}])
    with pytest.raises(ConfigError, match=message):
        read({"uri": uri, "pair": "y", "label_map": f"{tmp_path}/map.csv:{spec}"})


def test_a_label_map_is_read_by_characters_not_by_their_spelling(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text('y,to\ncafe\u0301,"a\n b"\n', encoding="utf-8")
    rows = [
        {"text": "a", "y": "caf\u00e9"},
        {"text": "b", "y": " cafe\u0301 "},
        {"text": "c", "y": "x" * 500},
    ]
    first, second, wrong = read(
        {"uri": lines(tmp_path / "fr.jsonl", rows), "pair": "y", "label_map": f"{tmp_path}/map.csv:y:to"}
    )
    assert (first.pair, second.pair) == ("a_b", "a_b")
    assert wrong.reason == f"the label '{'x' * 60}' is not in the label map"


def test_a_label_map_travels_with_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "map.tsv").write_text("y\tto\n1\teins\n", encoding="utf-8")
    uri = lines(tmp_path / "de.jsonl", [{"text": f"text {i}", "y": "1"} for i in range(20)])
    source = Source(uri=uri, pair="y", label_map=f"{tmp_path}/map.tsv:y:to", task="topic")
    (file,) = sources.list_files((source,), SETTINGS)
    assert sources.SourceFile.of(json.loads(json.dumps(dataclasses.asdict(file)))) == file
    built = scan.merge([file], [(0, scan.read_file(file, 1000, 1, SETTINGS))], Corpus(), "hash")
    (tmp_path / "map.tsv").unlink()
    manifest.save(built, str(tmp_path / "run"), SETTINGS)
    loaded = manifest.load(str(tmp_path / "run"), SETTINGS)
    assert loaded == built
    assert [(held.language, held.pair) for held in loaded.held_out] == [("topic:de", "eins")]
    others = [
        dataclasses.replace(file, label_map=(("1", "uno"),)),
        dataclasses.replace(file, part=(0.0, 0.5)),
        dataclasses.replace(file, part_by="id"),
        dataclasses.replace(file, task="other"),
    ]
    assert len({manifest.fingerprint([one], Corpus()) for one in (file, *others)}) == 5


def test_bad_rows_keep_their_task(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'no JSON\n{"text": "a", "l": "no tag"}\n{"text": "a", "l": "de"}\n')
    (tmp_path / "x.csv").write_bytes(b"text,l\na\n")
    (tmp_path / "x.parquet").write_bytes(b"none")
    found = read({"uri": str(tmp_path), "files": "*.[jc]s*", "language": "column:l", "task": "ner"})
    assert [record.language for record in found] == ["ner:und", "ner:und", "ner:und", "ner:de"]
    (file,) = sources.list_files(
        (Source(uri=f"{tmp_path}/x.parquet", language="column:l", task="ner"),), SETTINGS
    )
    (refused,) = json.loads(scan.read_file(file, 1000, 0, SETTINGS))["refused"]
    assert (refused["language"], refused["position"]) == ("ner:und", "file")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"part": (0.5, 0.5)}, "holds no row; the first must be below the last"),
        ({"label_map": "map.csv:a:b"}, "needs sources\\[\\].pair, the column of the labels"),
        ({"part_by": "id"}, "format=text has no column 'id'; leave sources\\[\\].part_by out"),
        ({"pair": "tab", "part_by": "id"}, "format=text has no column 'id'"),
        ({"format": "file", "part_by": "text"}, "format=file has no column 'text'"),
        (
            {"format": "squad", "part_by": "title"},
            "or take one of answer, id, others, paragraph, question, sentences",
        ),
        ({"language": "column:l"}, "format=text has no columns; set sources\\[\\].language"),
    ],
)
def test_what_the_format_cannot_give_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    (tmp_path / "de.txt").write_text("eins\tone\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read({"uri": f"{tmp_path}/de.txt", **values})


def test_one_file_may_serve_two_tasks(tmp_path: Path) -> None:
    uri = lines(tmp_path / "en.jsonl", [{"text": "wake me", "intent": "alarm", "slots": "O O", "l": "en-GB"}])
    found = read(
        {"uri": uri, "pair": "intent", "task": "intent"},
        {"uri": uri, "pair": "slots", "task": "slots", "language": "column:l"},
        {"uri": uri, "pair": "slots", "task": "slots", "language": "column:l"},
    )
    assert sorted((record.language, record.pair) for record in found) == [
        ("intent:en", "alarm"),
        ("slots:en-GB", "O O"),
    ]


def test_dotted_columns_look_inside_unless_a_key_has_that_name(tmp_path: Path) -> None:
    rows = [{"text": {"de": "Wort", "en": ["a", "word"]}}, {"text.de": "flach"}, {"text": {"fr": "mot"}}]
    nested, flat, none = read({"uri": lines(tmp_path / "de.jsonl", rows), "text": "text.de"})
    assert (nested.text, flat.text, none.reason) == ("Wort", "flach", "no key 'text.de'")
    one, *others = read({"uri": str(tmp_path / "de.jsonl"), "text": "text.en.1"})
    assert (one.text, [other.reason for other in others]) == ("word", ["no key 'text.en.1'"] * 2)
    beyond = read({"uri": str(tmp_path / "de.jsonl"), "text": "text.en.2"})
    assert [record.reason for record in beyond] == ["no key 'text.en.2'"] * 3
    both = read({"uri": str(tmp_path / "de.jsonl"), "text": "text.de", "pair": "text.fr"})
    assert [record.reason for record in both] == ["no key 'text.fr'", "no key 'text.fr'", "no key 'text.de'"]


def test_a_whole_file_is_one_document(tmp_path: Path) -> None:
    code = "def f(x):\n\tif x:\n\n        return 'ü'\n"
    (tmp_path / "a.py").write_text(code, encoding="utf-8")
    (tmp_path / "b.py.gz").write_bytes(gzip.compress(b"pass\n"))
    (tmp_path / "c.py").write_bytes(b"\xff\n")
    source = {"uri": str(tmp_path), "files": "*.py*", "format": "file", "language": "zxx-python"}
    first, second, third = read(source)
    assert (first.text, first.language) == (code.rstrip(), "zxx-python")
    assert second.text == "pass"
    assert third.reason == "invalid UTF-8"
    with pytest.raises(ConfigError, match="format=file has no columns"):
        read({**source, "language": "column:l"})


def test_a_file_that_is_too_long_is_one_bad_record_and_never_held_as_a_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.py").open("wb") as file:
        file.writelines(("ü" * 60 + "\n").encode() * (1 << 13) for _ in range(32))
    (tmp_path / "b.py").write_text("ü" * 10_001, encoding="utf-8")
    (tmp_path / "c.py").write_text("ü" * 10_000, encoding="utf-8")
    tracemalloc.start()
    try:
        first, second, third = read({"uri": str(tmp_path), "format": "file", "language": "zxx-python"})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert re.fullmatch(r"longer than \d+ bytes", first.reason)
    assert second.reason == "longer than 10000 characters"
    assert third.text == "ü" * 10_000
    assert peak < 12 << 20


def test_questions_come_with_their_sentences(tmp_path: Path) -> None:
    context = "Das ist kurz. Hier steht es! Und\nSchluss"
    questions = [
        {"id": "a", "question": "Wo?", "answers": [{"answer_start": 14, "text": "Hier"}]},
        {"id": "b", "question": "Was?", "answers": [{"answer_start": 99, "text": "nichts"}]},
        {"id": "c", "question": "Leer?", "answers": []},
    ]
    body = {"data": [{"paragraphs": [{"context": context, "qas": questions}]}]}
    (tmp_path / "de.json").write_text(json.dumps(body), encoding="utf-8")
    good, outside, empty = read({"uri": str(tmp_path / "de.json"), "format": "squad"})
    assert good == Record(0, "de", "Wo?", "1\nDas ist kurz.\nHier steht es!\nUnd Schluss", "")
    assert outside.reason == "the answer lies in none of the sentences"
    assert empty.reason == "a question without an answer"
    told = {"context": context, "sentence_breaks": [[0, 14], [14, 40]], "qas": questions[:1]}
    (row,) = squad.rows(json.dumps({"data": [{"paragraphs": [told]}]}))
    assert not isinstance(row, BadRecord)
    assert row["sentences"] == "1\nDas ist kurz.\nHier steht es! Und Schluss"
    told = {"context": "Um 3.5 Uhr. Ja.", "sentences": ["Um 3.5 Uhr.", "Ja."], "qas": [later(9, 13)]}
    (row,) = squad.rows(json.dumps({"data": [{"paragraphs": [told]}]}))
    assert not isinstance(row, BadRecord)
    assert row["sentences"] == "0\nUm 3.5 Uhr.\nJa."
    for text in ("{", "[]", '{"data": [{}]}'):
        with pytest.raises(BrokenChunk, match="not in SQuAD's form"):
            list(squad.rows(text))


def later(*places: object) -> dict[str, Any]:
    """A question whose answers start there."""
    return {"question": "Wann?", "answers": [{"answer_start": place} for place in places]}


@pytest.mark.parametrize(
    ("paragraph", "reason"),
    [
        ({"context": "Ja.", "qas": None}, "a paragraph without a context, its sentences, or questions"),
        ({"context": None, "qas": [later(0)]}, "a paragraph without a context, its sentences, or questions"),
        ({"context": "Ja.", "qas": [later(0)], "sentences": ["Nein."]}, "a paragraph without a context"),
        ({"context": "Ja.", "qas": [later(0)], "sentence_breaks": [[0]]}, "a paragraph without a context"),
        (
            {"context": "Ja.", "qas": [later("secret")]},
            "not a question with its answers and where they start",
        ),
        ({"context": "Ja.", "qas": ["secret"]}, "not a question with its answers and where they start"),
        ({"context": "Ja.", "qas": [later()]}, "a question without an answer"),
        (
            {"context": "Ja.  ", "qas": [later(4)], "sentence_breaks": [[0, 3], [3, 5]]},
            "the answer lies in none",
        ),
        ({"context": "Ja.", "qas": [{**later(0), "question": None}]}, "null"),
    ],
)
def test_a_damaged_question_keeps_its_neighbours_and_tells_no_text(
    tmp_path: Path, paragraph: dict[str, Any], reason: str
) -> None:
    good = {"context": "Ja. Nein.", "qas": [later(99, 5)]}  # the second answer lies in a sentence
    body = {"data": [{"paragraphs": [good, paragraph, good]}]}
    (tmp_path / "de.json").write_text(json.dumps(body), encoding="utf-8")
    first, bad, last = read({"uri": str(tmp_path / "de.json"), "format": "squad"})
    assert (first.row, bad.row, last.row) == (0, 1, 2)
    assert first.pair == last.pair == "1\nJa.\nNein."
    assert bad.reason.startswith(reason)
    assert "secret" not in bad.reason


def test_sentences_end_at_marks_of_many_scripts() -> None:
    for text, count in (
        ("Hi. 3.5 kg? Yes!", 3),
        ("你好。很好！是吗？", 3),
        ("नमस्ते। ठीक", 2),
        ("لماذا؟ نعم", 2),
        ("no mark", 1),
    ):
        spans = squad.sentences(text)
        assert len(spans) == count
        assert "".join(text[first:last] for first, last in spans) == text


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not beside the checkout")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_questions_have_their_answer_in_the_right_sentence(language: str) -> None:
    place = SHARED / "xquad_r" / f"{language}.json"
    found = [record for record in read({"uri": str(place), "format": "squad"}) if not record.reason]
    body = json.loads(place.read_text(encoding="utf-8"))
    answers = [
        qa["answers"][0]["text"]
        for article in body["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    assert len(found) == len(answers) > 600
    hits = 0
    for record, answer in zip(found, answers, strict=True):
        number, *sentences = record.pair.split("\n")
        hits += " ".join(answer.split())[:20] in sentences[int(number)]
    assert hits / len(answers) > 0.98


def test_labels_may_be_numbers_and_words_may_be_lists(tmp_path: Path) -> None:
    rows = [{"text": "a", "y": 3}, {"text": "b", "y": True}, {"text": "c", "y": 1.5}]
    three, true, none = read({"uri": lines(tmp_path / "de.jsonl", rows), "pair": "y"})
    assert (three.pair, true.pair, none.reason) == ("3", "true", "not text but float")
    listed = [
        {"w": ["der", "All tag"], "t": ["O", "B-LOC"]},
        {"w": ["im"], "t": [0]},
        {"w": ["a", "b"], "t": ["O"]},
    ]
    tags, numbers, uneven = read({"uri": lines(tmp_path / "en.jsonl", listed), "text": "w", "pair": "t"})
    assert (tags.text, tags.pair) == ("der Alltag", "O B-LOC")
    assert (numbers.text, numbers.pair) == ("im", "0")
    assert (uneven.text, uneven.pair) == ("a b", "O")  # the job ends here, and names the row


@pytest.mark.parametrize(
    ("words", "tags", "reason"),
    [
        (["Haus", None], ["NOUN", "X"], "word 1: null"),
        (["Haus", ["da"]], ["NOUN", "X"], "word 1: not text but list"),
        (["", "b"], ["O", "B-LOC"], "word 0: empty"),
        (["a", "\ufeff", "b"], ["O", "O", "O"], "word 1: empty"),
        (["Haus", "da"], ["NOUN", None], "tag 1: null"),
        (["Haus", "da"], ["NOUN", {"a": 1}], "tag 1: not text but dict"),
        (["Haus", "da"], ["NOUN", " "], "tag 1: empty"),
    ],
)
def test_what_is_no_word_or_tag_moves_no_other(
    tmp_path: Path, words: list[object], tags: list[object], reason: str
) -> None:
    rows = [{"w": words, "t": tags}, {"w": ["gut", 7], "t": ["O", "B-X"]}]
    odd, plain = read({"uri": lines(tmp_path / "de.jsonl", rows), "text": "w", "pair": "t"})
    assert (odd.text, odd.pair, odd.reason) == ("", "", reason)
    assert (plain.text, plain.pair, plain.reason) == ("gut 7", "O B-X", "")


def test_both_directions_hold_out_the_same_pairs() -> None:
    assert (
        scan.content_hash("Wort", "word")
        == scan.content_hash("word", "Wort")
        != scan.content_hash("word", "")
    )


def test_an_empty_corpus_says_what_was_wrong_with_most_rows(tmp_path: Path) -> None:
    uri = lines(tmp_path / "de.jsonl", [{"other": "a"}, {"other": "b"}, {"text": ""}])
    files = sources.list_files((Source(uri=uri),), SETTINGS)
    fragments = [(0, scan.read_file(files[0], 1000, 0, SETTINGS))]
    with pytest.raises(ConfigError, match=r"the corpus is empty.*most were refused: no key 'text'"):
        scan.merge(files, fragments, Corpus(), "hash")
