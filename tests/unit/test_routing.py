"""Which language a request is in, and which adapter answers it."""

from __future__ import annotations

import langcodes
import pytest

from serve_app import routing


@pytest.mark.parametrize(
    ("text", "spoken", "found"),
    [
        ("Wo bleibt meine Bestellung?", (), "de"),
        ("¿Dónde está mi pedido?", (), "es"),
        ("我的订单在哪里?", (), "zh"),
        ("أين طلبي؟", (), "ar"),
        ("注文はどこですか", ("ja", "zh"), "ja"),
        ("Hvor er pakken min? Jeg har ventet i to uker", ("no", "en"), "no"),
        ("Gdzie jest moja paczka? Czekam już dwa tygodnie", ("de", "en"), "pl"),
        ("내 주문은 어디에 있나요?", ("de", "en"), "ko"),
        ("Rote Schuhe", ("de", "en"), "de"),  # of no language that is likelier than not, but for these two
        ("4711-0815 !!!", (), None),
        ("", (), None),
    ],
)
def test_a_language_is_detected(text: str, spoken: tuple[str, ...], found: str | None) -> None:
    assert routing.detect(text, spoken) == found


def test_what_is_declared_counts_before_the_header_and_both_before_the_text() -> None:
    text, header = "Wo bleibt meine Bestellung?", "da;q=0.5, pt-br, xx-nonsense-;q=2"
    assert routing.spoken(text, declared="zh_hant", header=header).language == "zh-Hant"
    by_header = routing.spoken(text, header=header)
    assert (by_header.language, by_header.known_by) == ("pt-BR", "header")
    assert routing.spoken(text).known_by == "detected"
    assert routing.spoken("42", default="fr") == routing.Spoken("fr", "default")


@pytest.mark.parametrize("header", ["", "*", "zz", ";;;", "q=1", "de;q=abc", "de;q=0", "," * 5000])
def test_a_header_that_tells_nothing_is_passed_over(header: str) -> None:
    assert routing.spoken("42", header=header).known_by == "default"


@pytest.mark.parametrize("tag", ["xx", "klingon", "en; DROP", "d", "\u0434\u0435", "en-" * 200])
def test_a_declared_tag_that_is_none_is_refused(tag: str) -> None:
    with pytest.raises(routing.UnknownLanguageError, match="no tag of BCP 47"):
        routing.spoken("text", declared=tag)


@pytest.mark.parametrize(
    ("language", "step", "adapter"),
    [
        ("de", "language", "de"),
        ("de-AT", "language", "de"),
        ("gsw", "related", "de"),  # CLDR: 4
        ("uk", "related", "ru"),  # CLDR: 24
        ("nn", "related", "nb"),
        ("ja", "base", None),
        ("de-b2b", "base", None),
        ("fr-b2b", "language", "fr-b2b"),
    ],
)
def test_the_nearest_adapter_answers(language: str, step: str, adapter: str | None) -> None:
    found = routing.step(language, ["fr-b2b", "de", "ru", "nb"])
    assert (found.step, found.adapter) == (step, adapter)


def test_made_up_tags_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_KEPT", 100)
    for number in range(1000):
        assert routing.spoken("text", header=f"en-x-a{number}").known_by == "header"
    assert len(langcodes.Language._INSTANCES) < 300
    assert len(langcodes.Language._PARSE_CACHE) < 300
