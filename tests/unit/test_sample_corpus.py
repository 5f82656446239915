"""The embedded sample corpus keeps its promises: eight languages in parallel, and no text twice."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import mlray.corpus

SAMPLE = Path(mlray.corpus.__file__).parent / "sample"
LANGUAGES = {"en", "de", "fr", "es", "zh", "ja", "ar", "ru"}


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


PRODUCTS = rows_of("products")
SUPPORT = rows_of("support")
SESSIONS = rows_of("sessions")


def texts_of_products() -> list[str]:
    return [row[key] for row in PRODUCTS for key in ("title", "description")]


def texts_of_support() -> list[str]:
    return [text for row in SUPPORT for text in (*row["phrasings"], row["answer"])]


def test_products_exist_in_every_language() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for row in PRODUCTS:
        found[row["product_id"]].append(row["language"])
    assert len(found) >= 60
    assert {name for name, languages in found.items() if sorted(languages) != sorted(LANGUAGES)} == set()


def test_versions_of_a_product_agree() -> None:
    for key in ("brand", "category_id"):
        assert len({(row["product_id"], row[key]) for row in PRODUCTS}) == len(PRODUCTS) / 8
    shapes = {(row["product_id"], tuple(sorted(row["attributes"]))) for row in PRODUCTS}
    assert len(shapes) == len(PRODUCTS) / 8
    assert [row for row in PRODUCTS if not row["attributes"] or not all(row["attributes"].values())] == []


def test_no_description_or_title_comes_twice() -> None:
    for key in ("title", "description"):
        counts = Counter(row[key] for row in PRODUCTS)
        assert [text for text, count in counts.items() if count > 1] == []


def test_thirty_intents_in_every_language_with_four_phrasings_and_an_answer() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for row in SUPPORT:
        found[row["intent"]].append(row["language"])
        assert len(set(row["phrasings"])) == 4
        assert row["answer"].strip()
    assert len(found) == 30
    assert {name for name, languages in found.items() if sorted(languages) != sorted(LANGUAGES)} == set()
    counts = Counter((row["language"], text) for row in SUPPORT for text in row["phrasings"])
    assert [text for text, count in counts.items() if count > 1] == []


def test_three_hundred_sessions_in_four_markets_with_known_products() -> None:
    known = {row["product_id"] for row in PRODUCTS}
    assert len({row["session_id"] for row in SESSIONS}) == len(SESSIONS) == 300
    assert len({row["market"] for row in SESSIONS}) == 4
    assert {row["language"] for row in SESSIONS} == LANGUAGES
    events = [event for row in SESSIONS for event in row["events"]]
    assert {event["product_id"] for event in events} - known == set()
    assert {event["action"] for event in events} == {"view", "cart", "buy"}
    assert [row for row in SESSIONS if not row["events"]] == []


def test_texts_are_in_the_script_of_their_language() -> None:
    scripts = {"zh": "[一-鿿]", "ja": "[ぁ-ヿ一-鿿]", "ar": "[؀-ۿ]", "ru": "[Ѐ-ӿ]"}
    for row in PRODUCTS:
        script = scripts.get(row["language"], "[a-zA-Z]")
        letters = re.findall(r"[^\W\d_]", row["description"])
        own = sum(bool(re.fullmatch(script, letter)) for letter in letters)
        assert own > 0.6 * len(letters), row["description"]


def test_texts_are_clean() -> None:
    texts = texts_of_products() + texts_of_support()
    assert [text for text in texts if text != text.strip() or "\ufffd" in text or len(text) < 5] == []


def test_licence_lies_beside_the_texts() -> None:
    assert "Apache-2.0" in (SAMPLE / "LICENSE").read_text(encoding="utf-8")
