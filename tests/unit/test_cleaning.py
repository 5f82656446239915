"""One rule for every record: clean text, or a reason that does not quote it."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlray.corpus.cleaning import BadRecord, clean, decode


def test_decode_reads_utf8() -> None:
    assert decode("Größe 尺码 مقاس 🛒".encode()) == "Größe 尺码 مقاس 🛒"


@pytest.mark.parametrize(
    ("raw", "position"), [(b"\xff", 0), (b"abc\xe9", 3), (b"ab\xc0\xaf", 2), (b"a\xed\xa0\x80", 1)]
)
def test_decode_names_the_first_bad_byte(raw: bytes, position: int) -> None:
    with pytest.raises(BadRecord, match=f"^invalid UTF-8 at byte {position}$"):
        decode(raw)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain text", "plain text"),
        ("  outer \t\n", "outer"),
        ("a\tb\nc", "a\tb\nc"),
        ("e\u0301te\u0301", "été"),
        ("\ufeffBOM", "BOM"),
        ("bell\x07 and \x1bescape\x7f\x9f", "bell and escape"),
        ("\x01 padded \x02", "padded"),
        ("\ufeff  shop", "shop"),
        ("soft\u00adhyphen zero\u200dwidth", "soft\u00adhyphen zero\u200dwidth"),
        ("日本語 🛒", "日本語 🛒"),
    ],
)
def test_clean_text(value: str, expected: str) -> None:
    assert clean(value, 100) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null"),
        (7, "not text but int"),
        (["a"], "not text but list"),
        ({"a": "b"}, "not text but dict"),
        (True, "not text but bool"),
        ("", "empty"),
        (" \u3000\n", "empty"),
        ("\x01\x02", "empty"),
        ("\x01 \x02", "empty"),
        ("secret\x00word", "NUL character"),
        ("secret\ud83dword", "lone surrogate"),
        ("secretword!", "longer than 10 characters"),
    ],
)
def test_bad_value_has_a_reason_without_its_text(value: object, reason: str) -> None:
    with pytest.raises(BadRecord) as caught:
        clean(value, 10 if reason.startswith("longer") else 100)
    assert str(caught.value) == reason


def test_length_is_counted_in_characters_inside_the_outer_space() -> None:
    assert clean("  日本語の本 ", 5) == "日本語の本"


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\x01\x07\ufeff\x85 \n\u0301\u00a0e")))
def test_clean_text_is_clean_for_ever(value: str) -> None:
    try:
        text = clean(value, 10_000)
    except BadRecord:
        return
    assert text == text.strip() != ""
    assert unicodedata.is_normalized("NFC", text)
    assert {c for c in text if unicodedata.category(c) == "Cc"} <= {"\t", "\n", "\r"}
    assert clean(text, 20_000) == text
