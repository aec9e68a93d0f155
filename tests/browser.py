"""Pages in a real browser, and what they asked for and complained of."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright import sync_api

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
PHONE = {"width": 375, "height": 812}


@contextlib.contextmanager
def start_browser() -> Iterator["sync_api.Browser"]:
    """Start the machine's Chromium, or Playwright's own, with an empty profile."""
    playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        program = next(filter(None, map(shutil.which, (*NAMES, own))), None)
        if program is None:
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        opened = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield opened
        opened.close()


class Visit:
    """An open page, and what it asked for and complained of."""

    def __init__(self, browser: "sync_api.Browser", url: str, **options: object) -> None:
        self.page = browser.new_page(**options)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
