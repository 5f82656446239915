"""Translations that are served: what must not be touched, which way a text goes, and what a broken one costs."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlray.config import Evaluation, RunConfig, Serving
from mlray.evaluation.report import Figure, Report
from mlray.models.generation import Writer
from mlray.release import companions
from mlray.release.companions import Translator
from serve_app import translating
from serve_app.errors import ApiError
from serve_app.models import Asked, Models
from serve_app.protection import Protected, Protector
from serve_app.reading import Reading
from serve_app.translating import Way, way
from tests.unit import test_translation
from tests.unit.test_models import ANSWERS, promoted


def protect(text: str, glossary: dict[str, str], names: list[str]) -> Protected:
    return Protector([text], glossary, names).protect(text)


learnt = test_translation.learnt
"""A model that copies German into German, and writes it backwards into English."""


_LONG = "Lieferscheinnummernverzeichnis2024"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Wo ist AB-1234?", ["AB-1234"]),
        ("Order #10-22/7 for 19,99 €, please", ["#10-22/7", "19,99 €"]),
        ("It costs $1,299.50. Thanks", ["$1,299.50"]),
        ("EUR 5 or 5 EUR", ["EUR 5", "5 EUR"]),
        ("1,7 l kettle, 2200 W", ["1,7 l", "2200 W"]),
        ("size 42 or XL", ["42", "XL"]),
        ("see https://shop.example/a?b=1 now", ["https://shop.example/a?b=1"]),
        ("write to Ann.Lee+x@shop.example.", ["Ann.Lee+x@shop.example"]),
        ("注文番号AB-12の状態", ["AB-12"]),
        ("３ Stück", ["３"]),
        ("Zamówiłem 3 w poniedziałek, 2 v Praze", ["3", "2"]),  # words, no watts and volts
        ("Danke...2 Paar", ["2"]),
        ("(see http://a.example/x1.)", ["http://a.example/x1"]),
        ("bei 70 °C, 50% mehr, 10:30 Uhr", ["70 °C", "50%", "10:30"]),
        ("KÜCHE-12, АБ-1234 und Lieferscheinnummernverzeichnis2024", ["KÜCHE-12", "АБ-1234", _LONG]),
        ("Größe XL oder M/L? S, XXS", ["XL", "M", "L", "S", "XXS"]),
        ("サイズMとXLの違い", ["M", "XL"]),
        ("M. Dupont, L'eau, l, m, LXL, XML", []),
        ("Hallo {name}, {{order_id}} ist da: %s von %2$d", ["{name}", "{{order_id}}", "%s", "%2$d"]),
        ("Ein <b class='x'>neues</b> Rad < 3 kg", ["<b class='x'>", "</b>", "3 kg"]),
        ("{}, {\n}, 100 %", ["100 %"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_numbers_and_addresses_are_kept(text: str, kept: list[str]) -> None:
    found = protect(text, {}, [])
    assert list(found.kept) == kept
    assert found.restore(found.masked) == text
    assert found.join(found.free) == text


def test_names_stay_and_words_of_the_glossary_are_exchanged() -> None:
    found = protect(
        "Der Norvik Kocher ist kein Kochertopf", {"kocher": "kettle", "der norvik": "-"}, ["Norvik"]
    )
    assert found.masked == "1 2 ist kein Kochertopf"
    assert found.kept == ("-", "kettle")  # the longer word counts
    assert found.restore("2 is 1") == "kettle is -"
    only = protect("NORVIK norvik", {}, ["Norvik"])
    assert only.kept == ("NORVIK", "norvik")


@pytest.mark.parametrize("word", ["Weiß", "İstanbul", "cafe\u0301", "WEIß"])
def test_words_are_found_whatever_their_letters(word: str) -> None:
    found = protect(f"Das ist {word}, ja", {word: "x"}, [])
    assert (found.masked, found.kept) == ("Das ist 1, ja", ("x",))


@pytest.mark.parametrize(("word", "text"), [("рис", "Красивый рисунок, борис"), ("Öl", "Erdöl, Ölung")])
def test_a_part_of_a_word_is_none(word: str, text: str) -> None:
    assert protect(text, {word: "x"}, []).kept == ()


def test_a_word_of_a_script_without_spaces_is_found_inside() -> None:
    found = protect("电热水壶在哪里", {"水壶": "kettle"}, [])
    assert (found.masked, found.kept) == ("电热1在哪里", ("kettle",))


@pytest.mark.parametrize("broken", ["2", "1 1", "1 2 3", "eins", "12", ""])
def test_a_translation_without_every_number_is_not_used(broken: str) -> None:
    assert protect("A-1 und B-2", {}, []).restore(broken) is None


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=5), max_size=3))
def test_what_is_taken_apart_is_whole_again(text: str, names: list[str]) -> None:
    found = protect(text, {}, [name for name in names if name.strip()])
    assert found.join(found.free) == text
    assert len(found.free) == len(found.kept) + 1


JUDGED = {"de-en": 60.0, "en-de": 55.0, "en-fr": 50.0, "fr-en": 50.0, "de-fr": 20.0, "fr-de": 31.0}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("de", "en", Way(("de", "en"), 60.0)),
        ("fr", "de", Way(("fr", "de"), 31.0)),  # good enough, so no detour
        ("de", "fr", Way(("de", "en", "fr"), 30.0, "pivot")),  # weak, and 60 % of 50 is more
        ("de-AT", "en-US", Way(("de", "en"), 60.0)),
        ("de", "de-CH", Way(("de",), None)),
        ("zh-Hans", "zh-Hant", None),  # another script is another text
        ("sr-Latn", "sr", None),
        ("zh", "zh-CN", Way(("zh",), None)),
        ("gsw", "en", Way(("de", "en"), 60.0, "related")),
        ("gsw", "de", None),  # related is not the same
        ("ja", "en", None),
        ("en", "ja", None),
    ],
)
def test_a_text_goes_the_better_way(source: str, target: str, expected: Way | None) -> None:
    assert way(source, target, JUDGED, "en", 30.0) == expected


def test_a_weak_direction_is_taken_where_no_detour_is_better() -> None:
    poor = {**JUDGED, "en-fr": 10.0}
    assert way("de", "fr", poor, "en", 30.0) == Way(("de", "fr"), 20.0)
    assert way("de", "fr", {"de-fr": 20.0}, "en", 30.0) == Way(("de", "fr"), 20.0)
    never = {"de-en": 60.0, "en-fr": 50.0}
    assert way("de", "fr", never, "en", 30.0) == Way(("de", "en", "fr"), 30.0, "pivot")
    assert way("fr", "de", never, "en", 30.0) is None


class Upper:
    """Writes in capitals, and forgets every number in a text with `lost`."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], str, str]] = []

    room = 12

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def translate(self, texts: list[str], source: str, target: str) -> list[str]:
        self.calls.append((texts, source, target))
        return ["LOST" if "lost" in text else text.upper() for text in texts]


class Held(Upper):
    """Writes nothing before its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def translate(self, texts: list[str], source: str, target: str) -> list[str]:
        assert self.gate.wait(30)
        return super().translate(texts, source, target)


def translated(model: Any, texts: list[str], path: Way, **told: Any) -> list[translating.Translation]:
    async def work() -> list[translating.Translation]:
        legs = translating.Legs.of(model, Serving.model_validate(told.get("settings", {})))
        return await translating.translate(legs, texts, path, told.get("glossary", {}), told.get("names", []))

    return asyncio.run(work())


def test_what_is_protected_survives_a_translator_that_loses_it() -> None:
    model = Upper()
    first, second, third = translated(
        model, ["order ab-1 now", "is ab-1  lost? ", "42"], Way(("de", "en"), 60.0), glossary={"now": "soon"}
    )
    assert (first.text, first.kept, first.whole) == ("ORDER ab-1 soon", ("ab-1", "soon"), True)
    assert (second.text, second.whole) == ("IS ab-1  LOST ", False)
    assert (third.text, third.whole) == ("42", True)
    assert model.calls == [
        (["order 1 2", "is 1  lost?"], "de", "en"),
        (["is", "lost?"], "de", "en"),
    ]


def test_sentences_are_translated_one_by_one_and_stand_where_they_stood() -> None:
    model = Upper()
    text = "first one.  then a-1!\n\nlost b-2? 終わり。次"
    (found,) = translated(model, [text], Way(("de", "en"), 60.0))
    assert found.text == "FIRST ONE.  THEN a-1!\n\nLOST b-2? 終わり。次"
    assert (found.kept, found.whole) == (("a-1", "b-2"), False)
    assert model.calls[0][0] == ["first one.", "then 1!", "lost 1?", "終わり。", "次"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Ich mag Dr. Oetker sehr.", ("Dr. Oetker",)),
        ("Bestellung Nr. 1234 ist da.", ("1234",)),
    ],
)
def test_a_full_stop_inside_or_before_what_is_protected_ends_nothing(
    text: str, kept: tuple[str, ...]
) -> None:
    model = Upper()
    (found,) = translated(model, [text], Way(("de", "en"), 60.0), names=["dr. oetker"])
    assert (found.kept, found.whole) == (kept, True)
    assert len(model.calls[0][0]) == 1


def test_lines_keep_their_indentation() -> None:
    (found,) = translated(Upper(), ["items:\n  - one\n\n  - two 2 \n"], Way(("de", "en"), 60.0))
    assert found.text == "ITEMS:\n  - ONE\n\n  - TWO 2 \n"


def test_so_many_words_in_so_much_text_are_refused() -> None:
    words = {f"word{chr(97 + n // 26)}{chr(97 + n % 26)}": "x" for n in range(256)}
    text = " ".join(words)
    with pytest.raises(ApiError) as refused:
        translated(Upper(), [text] * 10, Way(("de",), None), glossary=words)
    assert (refused.value.status, refused.value.code) == (413, "glossary_too_large")


def test_a_longer_text_of_the_first_leg_goes_on() -> None:
    class Longer(Upper):
        def translate(self, texts: list[str], source: str, target: str) -> list[str]:
            return [f"{text} {text}" for text in super().translate(texts, source, target)]

    model = Longer()
    (found,) = translated(model, ["a b c d e f g"], Way(("de", "en", "fr"), 30.0, "pivot"))
    assert len(found.text.split()) == 28


def test_what_the_model_would_cut_is_refused() -> None:
    with pytest.raises(ApiError) as refused:
        translated(Upper(), ["a " * 13], Way(("de", "en"), 60.0))
    assert (refused.value.status, refused.value.code) == (413, "text_too_long")


def test_too_much_at_once_is_refused() -> None:
    small = {"queued_tokens": 64}
    with pytest.raises(ApiError) as refused:
        translated(Upper(), ["a. " * 40], Way(("de", "en"), 60.0), settings=small)
    assert (refused.value.status, refused.value.code) == (413, "too_many_texts")


def test_an_unchanged_text_costs_no_model() -> None:
    model = Upper()
    (found,) = translated(model, ["ein Norvik. Zwei"], Way(("de",), None), glossary={"Norvik": "N"})
    assert (found.text, model.calls) == ("ein N. Zwei", [])


def test_a_detour_goes_both_legs() -> None:
    model = Upper()
    (found,) = translated(model, ["ein text"], Way(("de", "en", "fr"), 30.0))
    assert found.text == "EIN TEXT"
    assert model.calls == [(["ein text"], "de", "en"), (["EIN TEXT"], "en", "fr")]


def test_texts_of_one_direction_are_translated_together() -> None:
    model = Held()
    ways = [Way(("de", "en"), 60.0), Way(("fr", "en"), 60.0)]

    async def work() -> list[list[translating.Translation]]:
        legs = translating.Legs.of(model, Serving())  # type: ignore[arg-type]

        def ask(text: str, path: Way) -> asyncio.Task[list[translating.Translation]]:
            return asyncio.create_task(translating.translate(legs, [text], path, {}, []))

        first = ask("first", ways[0])
        while legs.batcher._running is None or legs.batcher.waiting:  # until its pass has begun
            await asyncio.sleep(0.01)
        others = [ask(f"text {'abcdefgh'[n]}", ways[n % 2]) for n in range(8)]
        each = translating.cost(translating.Leg("", "de", "en", 2))
        while sum(legs.batcher.waiting.values()) < 8 * each:
            await asyncio.sleep(0.01)
        model.gate.set()
        await first
        return list(await asyncio.gather(*others))

    found = asyncio.run(work())
    assert [one[0].text for one in found] == [f"TEXT {letter}" for letter in "ABCDEFGH"]
    assert [(len(texts), source) for texts, source, _ in model.calls] == [(1, "de"), (4, "de"), (4, "fr")]


def with_translator(
    root: Path, model: Any, monkeypatch: pytest.MonkeyPatch, judged: dict[str, float], **serving: Any
) -> Models:
    beside = {"translator": model}
    monkeypatch.setattr(companions, "open_companion", lambda _, __, name, **___: beside.get(name))
    cells = {
        "translation": {name: {"chrF": Figure(value, value, value, 9, "")} for name, value in judged.items()}
    }
    monkeypatch.setattr("serve_app.champion.bundle.report_of", lambda *_: (Report({}, cells), ""))
    promoted(root, "one", 0, prefix="a")
    registry = {
        "release": {"registry_uri": str(root / "registry")},
        "serving": {"watch_s": 1000.0, **serving},
    }
    return Models(RunConfig.model_validate(registry))


def test_a_trained_translator_serves_what_it_was_judged_on(
    learnt: tuple[list[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Translator(Writer(learnt[1]), Evaluation(num_beams=1, max_new_tokens=16))
    models = with_translator(tmp_path, model, monkeypatch, {"de-en": 90.0, "en-de": 80.0})
    ask = models.translate(["der Wasserkocher ist leise 77"], "en", {}, [], Asked("de"))
    found = asyncio.run(ask)
    (told,) = found["translations"]
    assert (
        told["text"] == "leise ist Wasserkocher der 77"
    )  # the model has no digits: its parts were translated
    assert (told["kept"], told["whole"]) == (("77",), False)
    assert (found["way"], found["quality"], found["served_by"]["step"]) == (["de", "en"], 90.0, "language")
    with pytest.raises(ApiError) as refused:
        asyncio.run(models.translate(["x"], "ja", {}, [], Asked("de")))
    assert (refused.value.status, refused.value.code) == (404, "unknown_direction")
    assert "de-en, en-de" in refused.value.message
    with pytest.raises(ApiError) as refused:
        asyncio.run(models.translate(["x"], "no language", {}, [], Asked("de")))
    assert refused.value.code == "unknown_language"


def test_the_language_of_a_text_is_read_from_it_where_none_is_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = with_translator(tmp_path, Upper(), monkeypatch, {"de-en": 90.0, "en-de": 80.0})
    text = "Wo bleibt denn meine Bestellung und wann wird sie geliefert"
    found = asyncio.run(models.translate([text], "en", {}, [], Asked()))
    assert (found["way"], found["served_by"]["known_by"]) == (["de", "en"], "detected")
    several = asyncio.run(models.translate(["XL", text], "en", {}, [], Asked()))  # a size, then a description
    assert several["way"] == ["de", "en"]


def test_a_bundle_without_a_translator_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = with_translator(tmp_path, None, monkeypatch, {})
    with pytest.raises(ApiError) as refused:
        asyncio.run(models.translate(["x"], "en", {}, [], Asked("de")))
    assert (refused.value.status, refused.value.code) == (404, "no_translator")


def test_an_answer_in_another_language_is_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(judged: dict[str, float], model: Any = None, language: str = "de") -> dict[str, Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        models = with_translator(folder, model or Lower(), monkeypatch, judged, confidence=0.999)
        return asyncio.run(models.support([ANSWERS["en"]["back"]], 2, Asked(language)))

    class Lower(Upper):
        room = 99

        def translate(self, texts: list[str], source: str, target: str) -> list[str]:
            self.calls.append((texts, source, target))
            return [f"{target} {text.lower()}" for text in texts]

    class Broken(Lower):
        def translate(self, *_: Any) -> list[str]:
            raise ValueError

    english = ANSWERS["en"]["back"].upper()
    found = ask({"en-de": 90.0})
    assert (found["answer"], found["translated"], found["language"]) == (f"de {english.lower()}", True, "de")
    assert (found["scope"], found["sources"][0]["text"]) == ("other", english)
    for judged in (
        {"de-en": 90.0},
        {"en-de": 10.0},
    ):  # not judged on this direction, or too weak (serving.weak)
        found = ask(judged)
        assert (found["answer"], found["translated"], found["language"]) == (english, False, "en")
    assert ask({"en-de": 90.0}, Broken())["answer"] == english
    for language in ("uk", "zh-Hant"):  # Russian is near to Ukrainian, and is not what the customer speaks
        found = ask({"en-ru": 90.0, "en-zh": 90.0}, language=language)
        assert (found["answer"], found["translated"]) == (english, False)


def test_an_answer_that_takes_long_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A translation and other words have one share of the time together."""

    async def never(*_: object) -> str | None:
        await asyncio.Event().wait()
        return "too late"

    models = with_translator(tmp_path, Upper(), monkeypatch, {"en-de": 90.0}, confidence=0.999, timeout_s=2.0)
    monkeypatch.setattr(Reading, "translated", never)
    monkeypatch.setattr(Reading, "written", lambda *_: pytest.fail("the time is over"))
    found = asyncio.run(models.support([ANSWERS["en"]["back"]], 2, Asked("de"), write=True))
    told = (ANSWERS["en"]["back"].upper(), False, False)
    assert (found["answer"], found["translated"], found["written"]) == told


def test_a_full_queue_of_one_language_keeps_no_other_out() -> None:
    model = Held()

    async def work() -> list[Any]:
        legs = translating.Legs.of(model, Serving(queued_tokens=64))
        many = ["a b c d e f g h."] * 2  # as much as a language may have waiting

        def ask(source: str, queue: str | None = None) -> Any:
            return translating.translate(legs, many, Way((source, "en"), 60.0), {}, [], queue)

        first = asyncio.create_task(ask("de"))
        await asyncio.sleep(0.05)
        asked = (("de", None), ("de", None), ("de", "it"), ("fr", None))
        others = [asyncio.create_task(ask(*one)) for one in asked]
        await asyncio.sleep(0.05)
        model.gate.set()
        return list(await asyncio.gather(first, *others, return_exceptions=True))

    first, second, third, italians, french = asyncio.run(work())
    for one in (first, second, italians, french):
        assert one[0].text == "A B C D E F G H."
    assert isinstance(third, ApiError)
    assert third.code == "overloaded"
