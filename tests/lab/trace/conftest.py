"""A browser to look at pages with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Opened = Callable[[Path], tuple[Any, list[str]]]


@pytest.fixture(scope="module")
def opened() -> Iterator[Opened]:
    """Opens a page in headless Chromium; returns it, and everything that it complains of or asks for."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium to look at the page with (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def open_page(file: Path) -> tuple[Any, list[str]]:
            noticed: list[str] = []
            tab = browser.new_page(viewport={"width": 1100, "height": 900})
            tab.on("pageerror", lambda error: noticed.append(str(error)))
            tab.on("console", lambda message: noticed.append(message.text))
            tab.on(
                "request",
                lambda request: None if request.url.startswith(("file:", "data:")) else noticed.append(request.url),
            )
            tab.goto(file.as_uri())
            tab.wait_for_selector("body[data-ready=yes]")
            return tab, noticed

        yield open_page
        browser.close()
