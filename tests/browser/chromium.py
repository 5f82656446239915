"""A headless browser that notes what goes wrong on a page."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

FOUND = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-sync",
]
needed = pytest.mark.skipif(FOUND is None, reason="no Chromium here; Debian's package is called chromium")


@contextlib.contextmanager
def tab(own: str = "", *, width: int = 1280, height: int = 900) -> Iterator[tuple[Any, list[str]]]:
    """A page of a width, and its faults: errors of scripts, and requests to other hosts than `own` (an address)."""
    from playwright.sync_api import sync_playwright

    faults: list[str] = []

    def asked(request: Any) -> None:
        if request.url.startswith("http") and not (own and request.url.startswith(own)):
            faults.append(request.url)

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=FOUND, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda told: faults.append(told.text) if told.type == "error" else None)
        page.on("request", asked)
        yield page, faults
        browser.close()
