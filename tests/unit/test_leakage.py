"""Leaks: exact, near and translated rows in several scripts, by hand and against brute force."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jobs import evaluate as job
from mlray import configuration
from mlray.config import ConfigError
from mlray.corpus import cleaning
from mlray.corpus.testsets import Case
from mlray.evaluation import duplicates, leakage
from mlray.evaluation.duplicates import Duplicates
from mlray.evaluation.leakage import Index
from tests.unit import tiny

LONG = (
    "the kettle boils the water for two large cups of tea in less than a minute and a half while it stays cool "
    "enough on the outside to be touched"
)
CHINESE = "这款水壶加热很快而且非常安静，适合在办公室和宿舍使用，也适合旅行时携带。"


def write(path: Path, rows: list[tuple[str, str, str]]) -> str:
    """(language, text, translation) rows as a source."""
    lines = [json.dumps({"l": language, "text": text, "p": pair}) + "\n" for language, text, pair in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return f"{{uri: {path}, pair: p, language: 'column:l'}}"


def overrides(
    tmp_path: Path, test: list[tuple[str, str, str]], training: list[tuple[str, str, str]]
) -> list[str]:
    return [
        f"run.storage_uri={tmp_path}/runs",
        f"corpus.sources=[{write(tmp_path / 'training.jsonl', training)}]",
        f"evaluation.sources=[{write(tmp_path / 'test.jsonl', test)}]",
    ]


TEST = [
    ("de", "Der Wasserkocher ist leise!", "-"),
    ("de", "Die Decke hält warm.", "-"),
    ("en", LONG, "-"),
    ("en", "cold evenings", "-"),
    ("zh", CHINESE, "-"),
    ("zh", "一条柔软的毯子", "-"),
    ("ru", "Чайник кипит тихо", "-"),
    ("en-de", "a warm blanket for the evening", "Eine warme Decke für den Abend"),
    ("en-de", "the kettle is quiet", "Der Kessel schweigt"),
    ("en-de", "nothing of this", "nichts davon"),
]
TRAINING = [
    ("de", "was nichts damit zu tun hat", "-"),
    ("de", "DER  WASSERKOCHER, ist leise", "-"),  # other case, punctuation and white space
    ("en", LONG.replace("minute", "second"), "-"),
    ("zh", CHINESE.replace("非常", "十分").replace("，", " "), "-"),
    ("de", "eine warme Decke für den Abend.", "-"),  # the reference of a test row
    (
        "fr-en",
        "la bouilloire est silencieuse",
        "The kettle is quiet.",
    ),  # the text of a test row, as a translation
    ("ru", "Чайник кипит громко", "-"),
]


def test_each_kind_is_found_in_its_language_and_placed(tmp_path: Path) -> None:
    found = leakage.check(configuration.load(None, overrides(tmp_path, TEST, TRAINING)))
    counts = {
        language: (cell.rows, cell.exact, cell.near, cell.translated, cell.leaked)
        for language, cell in found.cells.items()
    }
    assert counts == {
        "de": (2, 1, 0, None, 1),
        "en": (2, 0, 1, None, 1),
        "en-de": (3, 1, 0, 2, 2),
        "ru": (1, 0, 0, None, 0),
        "zh": (2, 0, 1, None, 1),
    }
    places = {
        language: [(example.kind, example.test_row, example.training_row) for example in cell.examples]
        for language, cell in found.cells.items()
    }
    assert places == {
        "de": [("exact", 0, 1)],
        "en": [("near", 2, 2)],
        "en-de": [("exact", 8, 5), ("translated", 7, 4), ("translated", 8, 5)],
        "ru": [],
        "zh": [("near", 4, 3)],
    }
    assert {example.test for cell in found.cells.values() for example in cell.examples} == {
        f"{tmp_path}/test.jsonl"
    }
    assert (found.about["training_rows"], found.about["skipped"]) == (7, 0)
    body = found.to_json()
    assert json.loads(body)["cells"]["de"]["exact"] == 1
    assert "Wasserkocher" not in body  # places, never the text
    console = Console(file=io.StringIO(), width=100)
    leakage.show(found, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "66.7%" in printed
    assert f"de exact: row 0 of {tmp_path}/test.jsonl, row 1 of {tmp_path}/training.jsonl" in printed


def test_labels_and_tags_beside_a_text_are_no_translations(tmp_path: Path) -> None:
    test, training = [("de", "warm", "good")], [("de", "good", "warm"), ("de", "kalt", "good")]
    cell = leakage.check(configuration.load(None, overrides(tmp_path, test, training))).cells["de"]
    assert (cell.exact, cell.near, cell.translated, cell.leaked) == (0, 0, None, 0)
    # A dialect is spelled as a direction is; only the objective tells that its rows carry labels.
    test, training = [("de-ba", "warm", "good")], [("de-ba", "good", "warm"), ("de-ba", "kalt", "good")]
    for objective, leaks in (("classification", 0), ("translation", 1)):
        settings = [*overrides(tmp_path, test, training), f"objective.name={objective}"]
        cell = leakage.check(configuration.load(None, settings)).cells["de-ba"]
        assert (cell.exact, cell.translated or 0) == (
            leaks,
            leaks,
        )  # the pair "warm" is the text of the test row


def test_a_translation_is_found_by_the_id_that_it_shares(tmp_path: Path) -> None:
    for name, rows in (
        ("training", [("7", "fr", "une couverture chaude"), ("8", "fr", "la bouilloire")]),
        ("test", [("7", "de", "eine warme Decke"), ("9", "de", "der Kessel"), ("8", "sw", "birika")]),
    ):
        lines = [json.dumps({"id": key, "l": language, "text": text}) + "\n" for key, language, text in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    source = "{{uri: {}/{}.jsonl, language: 'column:l', part_by: id}}"
    settings = [
        f"corpus.sources=[{source.format(tmp_path, 'training')}]",
        f"evaluation.sources=[{source.format(tmp_path, 'test')}]",
        "objective.name=classification",
    ]
    cells = leakage.check(configuration.load(None, settings)).cells
    assert {name: (cell.rows, cell.exact, cell.translated, cell.leaked) for name, cell in cells.items()} == {
        "de": (2, 0, 1, 1),
        "sw": (1, 0, 1, 1),
    }


def identified(folder: Path, name: str, rows: list[tuple[object, str]], **others: object) -> None:
    """(id, text) rows as a file of a data set; `others` are more columns of each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": key, "text": text, **others}) + "\n" for key, text in rows]
    (folder / name).write_text("".join(lines), encoding="utf-8")


def translated(training: str, test: str) -> int:
    """The test rows of sources `{...}` whose translation is found by an id."""
    settings = [
        f"corpus.sources=[{training}]",
        f"evaluation.sources=[{test}]",
        "objective.name=classification",
    ]
    cells = leakage.check(configuration.load(None, settings)).cells.values()
    return sum(cell.translated or 0 for cell in cells)


def test_ids_say_nothing_across_data_sets_and_columns(tmp_path: Path) -> None:
    for folder, language, text in (("a", "de", "Decke"), ("a", "fr", "couverture"), ("b", "sw", "birika")):
        identified(tmp_path / folder, f"{language}.jsonl", [(5, text)], number=5)
    file = "{{uri: {0}/{1}.jsonl, language: filename, part_by: {2}}}"
    folder = "{{uri: {0}/{1}, files: '{2}*', language: filename, part_by: id}}"
    german = file.format(tmp_path, "a/de", "id")
    assert translated(file.format(tmp_path, "a/fr", "id"), german) == 1  # two files of one set
    assert translated(folder.format(tmp_path, "a/", "fr"), german) == 1  # its folder, and a file in it
    assert translated(folder.format(tmp_path, "a", "fr"), folder.format(tmp_path, "a", "de")) == 1
    assert translated(file.format(tmp_path, "b/sw", "id"), german) == 0  # another set
    assert translated(folder.format(tmp_path, "b", ""), folder.format(tmp_path, "a", "de")) == 0
    assert translated(file.format(tmp_path, "a/fr", "number"), german) == 0  # another column
    both = f"{german}, {file.format(tmp_path, 'a/de', 'number')}"  # one file by two columns
    assert translated(file.format(tmp_path, "a/fr", "number"), both) == 2


def test_languages_in_folders_of_their_own_are_one_set(tmp_path: Path) -> None:
    identified(tmp_path / "set" / "de", "test.jsonl", [("x", "Decke")])
    identified(tmp_path / "set" / "fr", "train.jsonl", [("x", "couverture")])
    source = "{{uri: {}/set, files: '*{}.jsonl', language: folder, part_by: id}}"
    assert translated(source.format(tmp_path, "train"), source.format(tmp_path, "test")) == 1
    names = ("hf://org/name", "hf://org/name:de:test", "hf://org/name:fr")
    assert {leakage._data_set(name, "runs/imported/name-1/part.parquet") for name in names} == {
        "hf://org/name"
    }


def test_a_missing_id_is_no_id(tmp_path: Path) -> None:
    missing = [None, "", " ", float("nan"), "None"]
    for name, words in (("de", "eins zwei drei vier fünf"), ("fr", "un deux trois quatre cinq")):
        identified(tmp_path, f"{name}.jsonl", list(zip(missing, words.split(), strict=True)))
    source = "{{uri: {}/{}.jsonl, language: filename, part_by: id}}"
    assert translated(source.format(tmp_path, "fr"), source.format(tmp_path, "de")) == 0
    settings = [
        f"{side}.sources=[{source.format(tmp_path, name)}]"
        for side, name in (("corpus", "fr"), ("evaluation", "de"))
    ]
    cell = leakage.check(configuration.load(None, [*settings, "objective.name=classification"])).cells["de"]
    assert (cell.rows, cell.translated) == (5, None)  # nothing could be checked
    for name, question in (("de", "Wo liegt Rom?"), ("fr", "Où est Rome ?")):
        asked = {"question": question, "answers": [{"answer_start": 0}]}  # without an id
        body = {"data": [{"paragraphs": [{"context": f"{name} Rom.", "qas": [asked]}]}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(body), encoding="utf-8")
    source = "{{uri: {}/{}.json, format: squad, language: filename, part_by: {}}}"
    assert translated(source.format(tmp_path, "fr", "id"), source.format(tmp_path, "de", "id")) == 0
    assert (
        translated(source.format(tmp_path, "fr", "paragraph"), source.format(tmp_path, "de", "paragraph"))
        == 1
    )


def test_folding_keeps_what_tells_texts_apart() -> None:
    assert cleaning.fold("Ｔhe  Kettle’s\tn° 5!") == cleaning.fold("the kettle's N°5")
    assert cleaning.fold("STRASSE") == cleaning.fold("Straße")
    assert cleaning.fold("पानी गरम") == "पानीगरम"  # vowel signs are no punctuation
    assert cleaning.fold("...") == "..." != cleaning.fold("!!!")
    assert duplicates.shingles("abcdef水很", 5) == {"abcde", "bcdef", "cdef水", "def水很", "水很"}
    assert duplicates.shingles("ab", 5) == {"ab"}


def by_hand(a: str, b: str) -> bool:
    """The stated criterion, for scripts with spaces."""

    def similarity(letters: int) -> float:
        runs = [{text[i : i + letters] for i in range(len(text) - letters + 1)} or {text} for text in (a, b)]
        return len(runs[0] & runs[1]) / len(runs[0] | runs[1])

    return similarity(5) >= 0.8 or (max(len(a), len(b)) < 60 and similarity(3) >= 0.64)


@pytest.mark.parametrize(("shortest", "longest"), [(1, 8), (6, 16), (10, 40)])
def test_near_duplicates_are_those_of_brute_force(shortest: int, longest: int) -> None:
    draw = np.random.default_rng(1)
    words = [*tiny.WORDS["de"], *tiny.WORDS["en"]]
    texts = ["".join(draw.choice(words, size=draw.integers(shortest, longest))) for _ in range(100)]
    for text in texts[:100]:  # a neighbour of each, with up to four letters changed or left out
        other = list(text)
        for place in draw.integers(0, len(other), size=draw.integers(0, 5)):
            other[place] = str(draw.choice(["", "x", "e"]))
        texts.append("".join(other) + "s" * int(draw.integers(0, 2)))
    texts = list({cleaning.fold(text): None for text in [*texts, "a", "aa", "aaa", "ab", "abc", "bcd"]})
    known = Duplicates(texts)
    near = 0
    for text in texts:
        expected = {other for other in texts if other != text and by_hand(text, other)}
        assert known.of(text) == expected
        near += bool(expected)
    assert 30 < near < len(texts) - 20


def test_short_texts_are_near_by_what_is_stated() -> None:
    near = [
        ("set an alarm for 7 am", "set an alarm for 8 am"),  # one letter of sixteen
        ("set an alarm for 7 am tomorrow", "set an alarm for 8 am tomorrow"),
        ("why has my card been declined", "why was my card been declined"),
        ("can you tell me about the fees of my account", "can you tell me about the costs of my account"),
        ("cancel my card", "cancel my cards"),
        ("明天早上七点叫我起床", "明天早上七点叫我起床吧"),
        ("请在明天早上七点叫我起床", "请在明天早上八点叫我起床"),
        ("請你在今天下午三點叫我", "請你在今天下午四點叫我"),  # one character of eleven
    ]
    apart = [
        ("waiting on my card", "waiting on the card"),
        ("set alarm for 7 am", "set alarm for 8 am"),  # one letter of fourteen
        ("where is my card", "where is my bank"),
        ("請在今天下午三點叫我", "請在今天下午四點叫我"),
    ]
    for pairs, expected in ((near, True), (apart, False)):
        for pair in pairs:
            one, other = map(cleaning.fold, pair)
            assert (Duplicates([one]).of(other) == {one}) is expected, pair
            assert (Duplicates([other]).of(one) == {other}) is expected, pair


@pytest.mark.parametrize(
    ("alphabet", "letters"),
    [("abcdefghijklmnopqrstuvwxyz0123456789", 16), ("水火木金土山川田石竹米虫貝", 11)],
)
def test_one_changed_letter_is_found_from_the_stated_length_on(alphabet: str, letters: int) -> None:
    for length in range(letters, len(alphabet) + 1):
        for place in range(length):
            text = alphabet[:length]
            other = text[:place] + alphabet[0 if place == length - 1 else -1] + text[place + 1 :]
            assert Duplicates([text]).of(other) == {text}
    text = alphabet[: letters - 1]
    middle = len(text) // 2
    assert not Duplicates([text]).of(text[:middle] + alphabet[-1] + text[middle + 1 :])


def test_the_training_text_is_not_kept() -> None:
    index = Index({"de": [Case("der Wasserkocher ist leise", "", "test", 0)]}, {})
    held = len(pickle.dumps(index))
    for row, text in enumerate(tiny.texts("de", 500, seed=3)):
        index.meet(text, "training", row)
    assert not index.found[leakage.EXACT]
    index.found[leakage.NEAR].clear()
    assert len(pickle.dumps(index)) == held


def test_bad_training_rows_are_counted_and_bad_test_rows_refused(tmp_path: Path) -> None:
    settings = overrides(tmp_path, TEST[:1], [*TRAINING, ("de", "", "-"), ("de", "gut", "-")])
    about = leakage.check(configuration.load(None, settings)).about
    assert (about["training_rows"], about["skipped"]) == (8, 1)
    settings = overrides(tmp_path, [*TEST[:1], ("de", " ", "-")], TRAINING)
    with pytest.raises(ConfigError, match=r"test\.jsonl: row 1 cannot be scored: empty"):
        leakage.check(configuration.load(None, settings))
    settings = overrides(tmp_path, [*TEST[:1], ("sw", " ", "-")], TRAINING)
    found = leakage.check(configuration.load(None, [*settings, "evaluation.max_bad_rows=1"]))
    assert found.cells["sw"] == leakage.Cell(0, 0, 0, None, 0, ())  # nothing of it is silently skipped
    console = Console(file=io.StringIO(), width=200)
    leakage.show(found, console)
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "│ sw │ 0 │ 0 │ 0 │ - │ 0 │ - │" in said
    assert "bad test rows left out: 1, the first: " in said
    settings = overrides(tmp_path, TEST[:1], TRAINING)
    with pytest.raises(ConfigError, match=r"corpus\.sources is empty; name the training text"):
        leakage.check(configuration.load(None, settings[2:]))
    with pytest.raises(ConfigError, match=r"evaluation\.sources is empty"):
        leakage.check(configuration.load(None, settings[:2]))


def test_rows_that_training_refuses_are_no_leak(tmp_path: Path) -> None:
    test = [("de-en", "der Kessel ist heiss", "the kettle is hot"), ("de-en", "die Decke", "the blanket")]
    training = [
        ("de-en", "Der Kessel ist heiss!", "it boils"),
        ("de-en", "es ist heiss", "The kettle is hot."),
        ("de-en", "dasselbe", "dasselbe"),  # nothing to learn from where the halves are told apart
        ("de-en", "der Kessel ist leer", "the kettle is empty"),
    ]
    settings = overrides(tmp_path, test, training)
    counts = {}
    for objective in ("translation", "contrastive"):
        for without_tests in ("false", "true"):
            own = [*settings, f"objective.name={objective}", f"corpus.without_tests={without_tests}"]
            found = leakage.check(configuration.load(None, own))
            about, cell = found.about, found.cells["de-en"]
            counts[objective, without_tests] = (about["training_rows"], about["skipped"], cell.leaked)
    assert counts == {
        ("translation", "false"): (4, 0, 1),
        ("translation", "true"): (2, 2, 0),
        ("contrastive", "false"): (3, 1, 1),
        ("contrastive", "true"): (1, 3, 0),
    }
    assert not (tmp_path / "runs").exists()  # it looks, and leaves nothing behind


def test_the_job_prints_it_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = overrides(tmp_path, TEST, TRAINING)
    arguments = ["evaluate.py", "--leakage", "--json", "--output", f"{tmp_path}/out", *settings]
    monkeypatch.setattr("sys.argv", arguments)
    assert job.main() == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["cells"]["en-de"]["translated"] == 2
    assert (tmp_path / "out" / "leakage.json").read_text(encoding="utf-8") == printed
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--leakage", *settings[:2]])
    assert job.main() == 2
    assert (
        capsys.readouterr().err == "configuration: evaluation.sources is empty; name at least one test set\n"
    )
