"""The page of a sweep in a browser: its plots are drawn, nothing is asked of other hosts, and no script fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlray.tuning import page
from tests.browser import chromium
from tests.unit.test_board import filled

pytestmark = chromium.needed


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Any, list[str]]]:
    """The page at the width of a desktop, and what went wrong on it."""
    place = tmp_path / "dashboard.html"
    place.write_text(page.page(filled()), encoding="utf-8")
    with chromium.tab() as (tab, faults):
        tab.goto(place.as_uri())
        yield tab, faults


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
