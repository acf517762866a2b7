from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from services.api.dashboard.numbers import MINUS
from support.api import TOKEN, ApiRun, serving
from support.showcase import Showcase, finished_run, hostile_run, running_run
from wa_core.records import Failed

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from wa_core.store.memory import MemoryStore


def test_an_empty_list_tells_how_to_submit(site: str, open_page: Callable[..., Page]) -> None:
    """A service without runs shows the command and the request that make one."""
    page = open_page(site)

    expect(page.get_by_role("heading", name="No runs yet")).to_be_visible()
    expect(page.get_by_text("wa submit digits")).to_be_visible()


def test_the_list_says_what_averaging_did(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """Each run's row shows its state, its progress, and the difference that its best average makes."""
    run = finished_run(store)

    row = open_page(site).get_by_role("row").filter(has_text=run.run_id[-8:])

    expect(row).to_contain_text("succeeded")
    expect(row).to_contain_text("264")
    expect(row).to_contain_text(f"{MINUS}0.042")
    expect(row).to_contain_text("averaged wins")


def test_a_new_run_appears_by_itself(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """A run that somebody submits is in the list soon, without the page being loaded again."""
    page = open_page(site)

    run = ApiRun(store)

    expect(page.get_by_text(run.run_id[-8:])).to_be_visible()


@pytest.mark.parametrize(
    ("field", "text"), [("Search", "digits vision"), ("Label", "team:vision"), ("State", "succeeded")]
)
def test_filters_leave_the_runs_that_match(
    site: str, store: MemoryStore, open_page: Callable[..., Page], field: str, text: str
) -> None:
    """Filtering by text, label or state leaves the matching runs, and the address tells the filter."""
    wanted, other = finished_run(store), Showcase(store, labels={"team": "nlp"})
    page = open_page(site)
    expect(page.get_by_text(other.run_id[-8:])).to_be_visible()

    if field == "State":
        page.get_by_label(field).select_option(text)
    else:
        page.get_by_label(field).press_sequentially(text)

    expect(page.get_by_text(other.run_id[-8:])).to_have_count(0)
    expect(page.get_by_text(wanted.run_id[-8:])).to_be_visible()
    assert text.partition(":")[0].partition(" ")[0] in page.url


def test_older_runs_are_a_page_away(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """More runs than fit are on further pages, and back is a click, too."""
    runs = [ApiRun(store) for _ in range(28)]
    page = open_page(site)
    expect(page.locator("tbody tr")).to_have_count(25)

    page.get_by_role("link", name="Older runs").click()

    expect(page.locator("tbody tr")).to_have_count(3)
    oldest = min(run.run_id for run in runs)
    expect(page.get_by_text(oldest[-8:])).to_be_visible()
    page.get_by_role("link", name="Newest").click()
    expect(page.locator("tbody tr")).to_have_count(25)


def test_the_keyboard_is_enough(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """From the first Tab a person skips to the content, and reaches a run by Tab and Enter alone."""
    run = running_run(store)
    page = open_page(site)

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")

    page.wait_for_url(f"**/runs/{run.run_id}")


def test_nothing_that_a_user_wrote_runs(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """HTML in labels, messages, config and log lines is shown as text: the canary stays undefined."""
    run = hostile_run(store)

    page = open_page(site)
    expect(page.locator(".label").first).to_contain_text("<img")
    canaries = [page.evaluate("window.__pwned")]
    page.goto(f'{site}/?q=<script>window.__pwned=3</script>&label="><script>window.__pwned=4</script>')
    canaries.append(page.evaluate("window.__pwned"))
    page.goto(f"{site}/runs/{run.run_id}")
    for tab in ("Checkpoints", "Events", "Logs", "Config"):
        page.get_by_role("tab", name=tab).click()
        expect(page.get_by_role("tabpanel", name=tab)).to_contain_text("<img src=x")
        canaries.append(page.evaluate("window.__pwned"))

    assert canaries == [None] * 6


def test_a_person_signs_in_and_out(
    store: MemoryStore, open_page: Callable[..., Page], complaints: list[str]
) -> None:
    """Bad input 2 on a phone: a wrong token is refused in words; the right one opens the page, and all fits."""
    run = finished_run(store)
    with serving(store, token=TOKEN) as site:
        page = open_page(site, viewport={"width": 360, "height": 740})
        for token in ("wrong", TOKEN):
            page.get_by_label("Token").fill(token)
            page.get_by_role("button", name="Sign in").click()
            expect(page.get_by_role("alert")).to_have_count(int(token == "wrong"))

        page.get_by_role("link", name=run.run_id[-8:]).click()
        expect(page.get_by_test_id("difference")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_role("button", name="Verify").click()
        page.get_by_role("button", name="Close").click()
        page.get_by_role("button", name="Sign out").click()

        expect(page.get_by_label("Token")).to_be_visible()
        page.goto(f"{site}/runs/{run.run_id}")
        expect(page.get_by_label("Token")).to_be_visible()
    assert all("401" in complaint for complaint in complaints)
    complaints.clear()


def test_no_token_no_page(store: MemoryStore, open_page: Callable[..., Page], complaints: list[str]) -> None:
    """Bad input 1 in a browser: without a session the page asks for a token, and shows nothing of any run."""
    run = finished_run(store)
    with serving(store, token=TOKEN) as site:
        page = open_page(f"{site}/runs/{run.run_id}")

        expect(page.get_by_label("Token")).to_be_visible()
        assert run.run_id not in page.content()
    assert all("401" in complaint for complaint in complaints)
    complaints.clear()


def test_a_run_that_failed_at_once_shows_why_and_no_empty_charts(
    site: str, store: MemoryStore, open_page: Callable[..., Page]
) -> None:
    """Without a checkpoint there is the reason, what to look at, and nothing that waits for numbers."""
    run = Showcase(store)
    run.start()
    run.log.append(Failed(reason="user_code", message="the recipe raised RuntimeError: " + "long_word_" * 40))

    page = open_page(site)
    expect(page.get_by_role("row", name="failed")).to_contain_text("nothing measured")
    page.get_by_role("link", name=run.run_id[-8:]).click()

    expect(page.locator("#run-head .fault")).to_contain_text("the recipe raised RuntimeError")
    expect(page.get_by_text("ended before its first checkpoint")).to_be_visible()
    expect(page.locator(".chart")).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
