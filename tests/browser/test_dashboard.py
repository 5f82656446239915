"""The page of a sweep in a browser: its plots are drawn, nothing is asked of other hosts, and no script fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlray.tuning import page
from tests.unit.test_board import filled

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; Debian's package is called chromium"
)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page at the width of a desktop, and what went wrong on it."""
    from playwright.sync_api import sync_playwright

    place = tmp_path / "dashboard.html"
    place.write_text(page.page(filled()), encoding="utf-8")
    faults: list[str] = []
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda told: faults.append(told.text) if told.type == "error" else None)
        tab.on("request", lambda asked: faults.append(asked.url) if asked.url.startswith("http") else None)
        tab.goto(place.as_uri())
        yield tab, faults
        browser.close()


def test_every_plot_is_drawn(opened: tuple[Any, list[str]], tmp_path: Path) -> None:
    tab, faults = opened
    tab.wait_for_selector(".heatmaplayer image")
    assert tab.locator(".js-plotly-plot").count() == 3
    assert tab.locator(".scatterlayer .trace").count() == 4
    assert tab.locator(".parcoords .y-axis").count() == 5  # two settings, mean, worst, objective
    assert tab.locator("tbody tr").count() == 4
    assert "fair" in tab.locator("tbody tr").first.inner_text()
    picture = tmp_path / "dashboard.png"
    tab.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    assert faults == []


def test_a_narrow_page_scrolls_only_inside_its_table(opened: tuple[Any, list[str]]) -> None:
    tab, _ = opened
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
