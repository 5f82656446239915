"""The console in a browser, on a desktop and on a phone: two shops that answer, and the models' reports."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from mlray.config import RunConfig, Serving
from serve_app import api, keys
from serve_app.keys import Key, Keys
from serve_app.models import Models
from tests.browser import chromium
from tests.unit.test_models import ANSWERS, TITLES, promoted

pytestmark = chromium.needed


class Address:
    """Where a server answers, and the keys that it asks for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys: Keys | None = None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """A small champion with two markets."""
    root = tmp_path_factory.mktemp("console")
    promoted(root, "one", 0, prefix="p")
    models = Models(
        RunConfig.model_validate(
            {"release": {"registry_uri": str(root / "registry")}, "serving": {"confidence": 0.99}}
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = Address(f"http://127.0.0.1:{port}")
    app = api.create(models, Serving(), lambda: address.keys)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield address
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_two_shops_answer(served: Address, tmp_path: Path, width: int, height: int) -> None:
    with chromium.tab(served.url, width=width, height=height) as (tab, faults):
        tab.goto(served.url)
        first, second = tab.locator(".shop").nth(0), tab.locator(".shop").nth(1)
        first.locator(".found li").nth(7).wait_for()
        assert first.locator("h2").inner_text() == "Laden"
        first.locator("input").fill(TITLES["de"][3])
        first.locator("form button").click()
        tab.wait_for_function(
            "title => document.querySelector('.shop .title')?.firstChild.textContent === title",
            arg=TITLES["de"][3],
        )
        assert first.locator(".score").first.inner_text() == "1.00"
        assert first.locator(".next").is_hidden()
        first.locator(".found li button").nth(0).click()
        first.locator(".next li").nth(3).wait_for()
        first.locator(".next li button").nth(0).press("Space")
        tab.wait_for_function("() => document.querySelector('.next .by').textContent.includes(' → ')")
        assert " · by texts · " in first.locator(".next .by").inner_text()
        seen = first.locator(".next .by").inner_text().split(" · ")[0].split(" → ")
        assert not set(seen) & set(first.locator(".next small").all_inner_texts())
        assert first.locator(".by").first.inner_text().startswith("de (detected, base) · ")
        second.locator("select").select_option("en")
        second.locator(".found li").nth(7).wait_for()
        assert second.locator("h2").inner_text() == "Shop"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.screenshot(path=tmp_path / "shop.png", full_page=True)
        tab.locator("#tab-models").click()
        assert first.is_hidden()
        # Answers since the page came.
        tab.locator("#models article").last.locator("th", has_text="de").wait_for()
        assert "champion: one-" in tab.locator("#models h2").first.inner_text()
        assert tab.locator("#tab-translate").is_hidden()  # this bundle has no translator
        assert tab.locator("#models article").first.locator("tbody tr").count() == 2
        tab.locator("#tab-models").press("ArrowLeft")  # the translator's is hidden
        assert tab.locator("#support").is_visible()
        assert tab.evaluate("document.activeElement.id") == "tab-support"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert faults == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_what_a_shop_returns_is_text_and_right_to_left_where_it_is_read_so(
    served: Address, tmp_path: Path, width: int, height: int
) -> None:
    with chromium.tab(served.url, width=width, height=height) as (tab, faults):
        hit = {"id": "<b>x</b>", "score": 0.5, "title": "<img src=x onerror=alert(1)>"}
        by = {"bundle": "b", "language": "ar", "known_by": "detected", "step": "base"}
        champion = {"role": "champion", "id": "b", "markets": {"ar": 1}, "report": {}}
        replies = {"models": {"data": [champion]}, "search": {"results": [hit], "served_by": by}}
        for name, told in replies.items():
            body = json.dumps(told)
            tab.route(f"**/v1/{name}", lambda route, _, body=body: route.fulfill(body=body))
        tab.goto(served.url)
        tab.locator(".shop").first.locator("li").wait_for()
        assert tab.locator(".shop img").count() == 0
        assert tab.locator(".shop .title").first.inner_text().startswith("<img")
        assert tab.locator(".shop").first.get_attribute("dir") == "rtl"
        assert tab.locator(".shop h2").first.inner_text() == "المتجر"
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.screenshot(path=tmp_path / "arabic.png", full_page=True)
        assert faults == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_customer_service_answers_or_hands_over(
    served: Address, tmp_path: Path, width: int, height: int
) -> None:
    with chromium.tab(served.url, width=width, height=height) as (tab, faults):
        tab.goto(served.url)
        tab.locator("#tab-support").click()
        for text in (ANSWERS["de"]["where"], "Regal"):
            tab.locator("#support input").fill(text)
            tab.locator("#support button").click()
            tab.wait_for_function("text => document.querySelector('#support input').value === ''", arg=text)
        tab.locator(".turn.person").wait_for()
        assert tab.locator(".turn").all_inner_texts()[0] == ANSWERS["de"]["where"]
        assert tab.locator(".turn").all_inner_texts()[1].startswith(ANSWERS["de"]["where"].upper())
        assert tab.locator(".turn.person").inner_text().startswith("A person takes over")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.screenshot(path=tmp_path / "support.png", full_page=True)
        assert faults == []


def test_a_text_is_translated(served: Address, tmp_path: Path) -> None:
    with chromium.tab(served.url, width=390, height=844) as (tab, faults):
        champion = {
            "role": "champion",
            "id": "b",
            "markets": {},
            "report": {},
            "translates": ["de-ar", "de-en", "pt-BR-en"],
            "targets": ["ar", "en"],
        }
        by = {"bundle": "b", "language": "de", "known_by": "detected", "step": "pivot"}
        told = {"text": "<i>أين؟</i>", "kept": [], "whole": True}
        found = {"translations": [told], "way": ["de", "en", "ar"], "quality": 31.4, "served_by": by}
        for name, body in (("models", json.dumps({"data": [champion]})), ("translate", json.dumps(found))):
            tab.route(f"**/v1/{name}", lambda route, _, body=body: route.fulfill(body=body))
        tab.goto(served.url)
        tab.locator("#tab-translate").click()
        assert tab.locator("#translate select").inner_text().split() == ["ar", "en"]
        tab.locator("#translate input").fill("Wo?")
        tab.locator("#translate select").select_option("ar")
        tab.locator("#translate button").click()
        tab.locator("#translate .turn").wait_for()
        assert tab.locator("#translate .turn").inner_text() == "<i>أين؟</i>"
        assert tab.locator("#translate .by").inner_text().startswith("de → en → ar · chrF 31 · ")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        tab.screenshot(path=tmp_path / "translate.png", full_page=True)
        assert faults == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_challenger_stands_beside_the_champion_with_its_report_and_trial(
    served: Address, tmp_path: Path, width: int, height: int
) -> None:
    with chromium.tab(served.url, width=width, height=height) as (tab, faults):
        report = {"retrieval": {"de-en": {"R@1": {"value": 61.25}, "MRR": {"value": 70.0}}}}
        common = {"why": "more text", "report": report}
        champion = {"role": "champion", "id": "shop-1", "index": "i-1", "since": "2026-11-27", **common}
        trial = {
            "canary": 0.1,
            "shadow": 0.5,
            "agreement": {"de": 0.31, "fr": 0.95},
            "stopped": {"de": "<b>too few</b>"},
        }
        challenger = {"role": "challenger", "id": "shop-2", "since": "2026-11-28", "trial": trial, **common}
        told = {"data": [champion, challenger], "fault": "the challenger cannot be taken up", "latency": {}}
        tab.route("**/v1/models", lambda route: route.fulfill(body=json.dumps(told)))
        tab.goto(served.url)
        tab.locator("#tab-models").click()
        tab.locator("#models article").nth(1).locator("td", has_text="61.3").wait_for()
        assert tab.locator("#models > p").inner_text() == told["fault"]
        cards = tab.locator("#models article").all_inner_texts()
        assert "index i-1 · 2026-11-27 · more text" in cards[0]
        assert "no index" not in cards[1]
        assert "answers 10 % of the customers, and 50 % of the other requests unseen; finds what" in cards[1]
        assert "de 31 %, fr 95 %" in cards[1]
        assert "de was stopped: <b>too few</b>" in cards[1]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.screenshot(path=tmp_path / "models.png", full_page=True)
        assert faults == []


def test_a_key_is_asked_for_and_kept_in_the_tab(served: Address) -> None:
    key, line = keys.make("page", 1)
    told = json.loads(line)
    served.keys = Keys({told["sha256"]: Key("page", keys.datetime.fromisoformat(told["expires"]))})
    try:
        with chromium.tab(served.url) as (tab, _):
            tab.goto(served.url)
            tab.locator("#key input").fill(key)
            tab.locator("#key button").click()
            tab.locator(".shop li").first.wait_for()
            assert tab.locator("#key").is_hidden()
    finally:
        served.keys = None
