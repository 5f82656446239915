"""Language tags in one spelling, and words counted in every script."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlray import languages


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("de", "de"),
        ("DE", "de"),
        (" fr\n", "fr"),
        ("zh_hant", "zh-Hant"),
        ("ZH-HANT-TW", "zh-Hant-TW"),
        ("pt-BR", "pt-BR"),
        ("en_GB", "en-GB"),
        ("de-en", "de-en"),
        ("zh-cn", "zh-CN"),
        ("zh_hant_tw", "zh-Hant-TW"),
        ("en-zh-cn", "en-zh-CN"),
        ("pt-br", "pt-BR"),
        ("ja-jp", "ja-JP"),
        ("de-de", "de-de"),
        ("es-ar", "es-ar"),
        ("de-ba", "de-ba"),
        ("es-419", "es-419"),
        ("sr-latn", "sr-Latn"),
        ("yue", "yue"),
        ("ca-VALENCIA", "ca-valencia"),
    ],
)
def test_tag_is_normalised(tag: str, expected: str) -> None:
    assert languages.normalize(tag) == expected


@pytest.mark.parametrize(
    "tag", ["", "d", "train", "en-", "-en", "de--at", "de at", "de.txt", "zh-häns", "1x", "en-a"]
)
def test_what_is_no_tag_gives_none(tag: str) -> None:
    assert languages.normalize(tag) is None


@given(st.from_regex(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8}){0,3}", fullmatch=True))
def test_normalising_twice_changes_nothing(tag: str) -> None:
    normal = languages.normalize(tag)
    assert normal is not None
    assert languages.normalize(normal) == normal


@pytest.mark.parametrize(
    ("characters", "expected"),
    [
        ("中文あアー㐀豈𠀀ไทยລາວខ្មែរမြန်", True),
        ("aZéñßяΩעבعربي한국हि1!,. \n", False),
    ],
)
def test_scripts_without_spaces(characters: str, expected: bool) -> None:
    assert [c for c in characters if languages.is_unspaced(c) is not expected] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        (" \n\t", 0),
        ("The quick  brown\nfox", 4),
        ("don't stop", 2),
        ("Привет, мир", 2),
        ("مرحبا بالعالم", 2),
        ("안녕 세상", 2),
        ("你好世界", 4),
        ("我喜欢coffee", 4),
        ("买 USB-C 线", 3),
        ("コーヒーを飲む", 7),
        ("สวัสดี", 4),  # four consonants; the vowel signs are marks
        ("你好，世界。", 4),  # punctuation is no word
    ],
)
def test_words_are_counted(text: str, expected: int) -> None:
    assert languages.count_words(text) == expected
