from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from support.showcase import Showcase, finished_run, measure_landscapes, running_run
from wa_core.catalog.landscapes import Landscapes
from wa_core.records import LandscapeRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from wa_core.store.memory import MemoryStore

MAX_BYTES = 200_000
WINDOWS = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light", "has_touch": True},
}
#: Parts of the run's page -> from the top of the first element to the bottom of the second.
PARTS = {
    "run": (".crumbs", "#verdict"),
    "steps": (".charts", ".charts + .card"),
    "layers": (".two", ".two"),
    "landscape": ("#landscape", "#landscape"),
    "records": (".records", ".records"),
}


@pytest.fixture
def showcase(store: MemoryStore) -> Showcase:
    """A finished run with both landscapes, among others."""
    Showcase(store, labels={"team": "language"}, averages={})
    run = finished_run(store)
    for kind in ("line", "plane"):
        Landscapes(store, run.run_id, "swa").ask(LandscapeRequest(kind=kind), clock=run.clock)
    measure_landscapes(run, "swa")
    running_run(store)
    return run


@pytest.mark.parametrize("window", WINDOWS)
def test_every_view_fits_its_window(
    site: str, showcase: Showcase, open_page: Callable[..., Page], window: str, request: pytest.FixtureRequest
) -> None:
    """Nothing is wider than the window, at a desk in either theme or on a phone; `--pictures` keeps the looks."""
    folder = request.config.getoption("--pictures")
    page = open_page(site, **WINDOWS[window])
    check_width(page)
    keep(page, folder, f"runs-{window}")

    page.goto(f"{site}/runs/{showcase.run_id}")
    page.get_by_label("Rule").fill("ema:half_life=40")
    expect(page.locator("#prediction")).to_contain_text("checkpoints")
    expect(page.locator("#plane-figure")).to_be_visible()
    page.get_by_label("Rule").blur()
    check_width(page)
    for part, (first, last) in PARTS.items():
        keep(page, folder, f"{part}-{window}", first=first, last=last)


def test_an_empty_service_is_a_picture_too(
    site: str, open_page: Callable[..., Page], request: pytest.FixtureRequest
) -> None:
    """The page of a service without runs fits a phone."""
    page = open_page(site, **WINDOWS["phone"])

    check_width(page)
    keep(page, request.config.getoption("--pictures"), "empty-phone")


def check_width(page: Page) -> None:
    """Nothing makes the page scroll sideways."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def keep(page: Page, folder: str | None, name: str, *, first: str = "body", last: str = "body") -> None:
    """Take a picture of a part of the page, if pictures are wanted."""
    if folder is None:
        return
    page.evaluate("scrollTo(0, 0)")
    top, bottom = (page.locator(element).first.bounding_box() for element in (first, last))
    assert top
    assert bottom
    margin = 16 if first != "body" else 0
    clip = {
        "x": 0,
        "y": max(0, top["y"] - margin),
        "width": page.viewport_size["width"] if page.viewport_size else 0,
        "height": bottom["y"] + bottom["height"] - top["y"] + 2 * margin,
    }
    path = Path(folder) / f"page-{name}.png"
    page.screenshot(path=path, full_page=True, clip=clip, animations="disabled")
    assert path.stat().st_size < MAX_BYTES
