"""A headless browser on the page that `hf-spp app` serves, and what went wrong in it."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Page, sync_playwright

COMMAND = (sys.executable, "-c", "from hf_spp.cli import main; main()", "app")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1200
LIMIT = 120_000


@dataclass
class Visit:
    """An open page, and what it and its server did.

    Attributes:
        page: Playwright's page.
        errors: Errors and warnings of the console, and failed answers.
        foreign: Addresses off this machine that were asked for.
        code: Exit code of the command, once it was interrupted.
    """

    page: Page
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    code: int | None = None

    def watch(self) -> None:
        """Take note of everything that goes wrong from now on."""
        page, errors = self.page, self.errors
        page.on("console", lambda one: errors.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("response", lambda one: errors.append(f"{one.status} {one.url}") if one.status >= 400 else None)
        page.context.on("request", self._note)

    def _note(self, request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.foreign.append(request.url)

    def choose_example(self, number: int) -> None:
        """Click an example, and wait for other answers."""
        before = self.page.locator("#answers").inner_text()
        self.page.locator("button.gallery-item").nth(number).click()
        self.page.wait_for_function("before => document.querySelector('#answers').innerText !== before", arg=before)

    def wait_for(self, selector: str, text: str) -> str:
        """Wait until an element holds a text; gives all its text."""
        place = self.page.locator(selector).filter(has_text=text)
        place.wait_for(timeout=LIMIT)
        return place.inner_text()


def find_browser() -> str | None:
    """Path of the system's Chromium, if it has one; Playwright's own is another download."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def _hear_interrupts() -> None:
    """Undo that a shell which started the tests in the background made them and their children deaf to Ctrl+C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def visited(*words: str, folder: Path | None = None) -> Iterator[Visit]:
    """Serve a page with `hf-spp app` and these words, called in a folder, and open it in a browser inside the block."""
    command = [*COMMAND, *words, "--no-browser"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder, preexec_fn=_hear_interrupts
    ) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())
            assert address, "hf-spp app printed no address"
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
                visit = Visit(browser.new_page(viewport={"width": WIDTH, "height": 900}))
                visit.watch()
                visit.page.goto(address[0])
                yield visit
                browser.close()
            server.send_signal(signal.SIGINT)
            visit.code = server.wait(timeout=30)
        finally:
            server.kill()
