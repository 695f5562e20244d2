"""A real Chromium for the tests: the system's own, kept off the network, with everything that it complains of noted down."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.debian import cannot_install

OFF_THE_NETWORK = ["--no-sandbox", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]


@dataclass
class Visit:
    """A tab, and what it should never hold."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    """Errors and warnings of the console, and uncaught exceptions."""
    requests: list[str] = field(default_factory=list)
    """What it loaded from elsewhere than the disk."""

    def note(self, url):
        if not url.startswith(("file:", "data:")):
            self.requests.append(url)

    def open(self, path, width=1400):
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.goto(path if str(path).startswith("file:") else path.absolute().as_uri())
        return self.page

    def fits(self):
        """Whether nothing is wider than the screen."""
        return self.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def installed() -> str | None:
    """Path of a Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium():
    """A tab of the system's Chromium, which is installed where that can be done; else the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="nothing drives a browser here (make drivers)")
    if not (executable := installed()) and (reason := cannot_install(["chromium"], ["chromium"])):
        pytest.skip(reason)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable or installed(), args=OFF_THE_NETWORK)
        visit = Visit(browser.new_page())
        visit.page.on("console", lambda message: visit.complaints.append(f"{message.type}: {message.text}"))
        visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        visit.page.on("request", lambda request: visit.note(request.url))
        yield visit
        browser.close()
