"""The system's Chromium for tests: pages that fail their test when they complain of anything. For `conftest`."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, ConsoleMessage, Page


PATIENCE_MS = 60_000  # of a machine that does much else


@pytest.fixture(scope="module")  # while it is open an event loop runs, which tests in other modules want to do
def browser() -> Iterator[Browser]:
    """The system's Chromium; it refuses its sandbox to root, which tests often are.

    Shared memory is small in containers, and a page that finds none left crashes.
    """
    chromium = shutil.which("chromium")
    assert chromium, "install Chromium (`make browser`)"
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=chromium, args=arguments, timeout=2 * PATIENCE_MS)
        yield started
        started.close()


@pytest.fixture
def complaints() -> list[str]:
    """What pages have complained of so far; a test that expects a complaint takes it out."""
    return []


@pytest.fixture
def open_page(browser: Browser, complaints: list[str]) -> Iterator[Callable[..., Page]]:
    """Opens pages, each in a browser context of its own; at the end none may have complained.

    What the content security policy blocks is a complaint, and so is every request that failed or was refused.
    """
    contexts = []

    def opened(url: str, **context: object) -> Page:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}))  # type: ignore[arg-type]
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: _note(complaints, message))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def _note(complaints: list[str], message: ConsoleMessage) -> None:
    if message.type in {"error", "warning"}:
        complaints.append(f"{message.text} ({message.location.get('url')})")
