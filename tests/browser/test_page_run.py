from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from services.api.dashboard.numbers import MINUS
from support.api import ApiRun, serving
from support.patience import eventually
from support.ports import free_port
from support.showcase import TOTAL_STEPS, finished_run, measure_landscapes, running_run, verify_averages

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.sync_api import Page

    from wa_core.store.memory import MemoryStore


def test_the_headline_is_the_difference_with_its_interval(
    site: str, store: MemoryStore, open_page: Callable[..., Page]
) -> None:
    """The first thing on a run's page is averaged minus raw on held-out data, its interval, and who has won."""
    page = open_page(f"{site}/runs/{finished_run(store).run_id}")

    verdict = page.get_by_role("region", name="What averaging did")
    expect(page.get_by_test_id("difference")).to_have_text(f"{MINUS}0.034")
    expect(verdict).to_contain_text("averaged wins")
    expect(verdict).to_contain_text(f"95 % interval [{MINUS}0.054, {MINUS}0.015] over 360 samples")


def test_every_chart_has_something_on_it(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """Metric, timeline, learning rate and lag are drawn, in the colours of raw and averaged weights."""
    page = open_page(f"{site}/runs/{finished_run(store).run_id}")

    for name in ("metric", "timeline", "rate", "lag"):
        expect(page.locator(f"#chart-{name} canvas")).to_be_visible()
        assert num_colours(page, f"#chart-{name} canvas") > 4, f"{name} is empty"


def test_the_arrow_keys_tell_what_became_of_each_checkpoint(
    site: str, store: MemoryStore, open_page: Callable[..., Page]
) -> None:
    """The charts' cursor moves by the keyboard over all four, and its numbers are said in words."""
    page = open_page(f"{site}/runs/{finished_run(store).run_id}")
    page.locator("#stack").focus()

    said = []
    for _ in range(14):
        page.keyboard.press("ArrowRight")
        said.append(page.locator("#readout").inner_text())

    assert said[0].startswith("step 20 · skipped")
    assert "step 120 · rejected" in said[5]
    assert "averaged loss" in said[6]
    assert re.search(r"step 180 · .*abandoned", " ".join(said))


def test_the_tables_tell_the_same(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """Every checkpoint's fate is in a table, for those who see no chart: folded, skipped, rejected, abandoned."""
    page = open_page(f"{site}/runs/{finished_run(store).run_id}", java_script_enabled=False)

    table = page.locator("#checkpoints")
    fates = {
        fate: table.locator(f".fate-{fate}").count() for fate in ("folded", "skipped", "rejected", "abandoned")
    }

    assert fates == {"folded": 9, "skipped": 4, "rejected": 1, "abandoned": 2}
    expect(table).to_contain_text("not_finite: tensor 'stem.weight' holds 3 values that are not finite")
    expect(page.locator("#layers")).to_contain_text("blocks.1.conv2")
    expect(page.locator("#batchnorm")).to_contain_text("blocks.0.bn1")


def test_another_average_is_a_click_away(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """The picker shows each average's difference and leads to its own charts."""
    page = open_page(f"{site}/runs/{finished_run(store).run_id}")

    page.get_by_role("navigation", name="Averages").get_by_role("link", name="ema").click()

    expect(page.get_by_role("link", name="ema")).to_have_attribute("aria-current", "true")
    expect(page.get_by_text("Weight of each checkpoint in ema")).to_be_visible()
    expect(page.get_by_test_id("difference")).to_have_text(f"{MINUS}0.028")


def test_the_page_follows_the_run(site: str, store: MemoryStore, open_page: Callable[..., Page]) -> None:
    """New checkpoints, generations and the end of the run show by themselves."""
    run = running_run(store)
    page = open_page(f"{site}/runs/{run.run_id}")
    expect(page.locator("#connection")).to_have_text("live")
    before = page.get_by_test_id("difference").inner_text()

    run.train(TOTAL_STEPS)

    expect(page.locator("#checkpoints tbody tr")).to_have_count(14)
    expect(page.get_by_test_id("difference")).not_to_have_text(before)
    run.finish()
    expect(page.locator("#run-head .state")).to_have_text("succeeded")
    expect(page.locator("#connection")).to_have_text("")


def test_the_page_outlives_the_service(
    store: MemoryStore, open_page: Callable[..., Page], complaints: list[str]
) -> None:
    """While the API restarts the page says so; after it, it goes on where it was."""
    run, port = running_run(store), free_port()
    with serving(store, port=port) as site:
        page = open_page(f"{site}/runs/{run.run_id}")
        expect(page.locator("#connection")).to_have_text("live")
    expect(page.locator("#connection")).to_have_text("reconnecting…")
    run.train(180)

    with serving(store, port=port):
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#checkpoints tbody tr")).to_have_count(9)
        page.goto("about:blank")
    complaints[:] = [text for text in complaints if "ERR_" not in text and "htmx:sendError" not in text]


def test_a_run_is_paused_resumed_and_cancelled_after_a_question(
    site: str, store: MemoryStore, open_page: Callable[..., Page]
) -> None:
    """Each button asks first; no leaves the run as it is, yes is asked of the run, and the state follows."""
    page = open_page(f"{site}/runs/{ApiRun(store).run_id}")
    state = page.locator("#run-head .state")

    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Leave it as it is").click()
    expect(state).to_have_text("queued")
    for button, after in (("Pause", "paused"), ("Resume", "queued"), ("Cancel", "cancelled")):
        page.get_by_role("button", name=button, exact=True).click()
        page.locator("#confirm-yes").click()
        expect(state).to_have_text(after)

    expect(page.locator("#run-head").get_by_role("button")).to_have_count(0)


def test_what_if_draws_another_rule_and_builds_it(
    site: str, store: MemoryStore, open_page: Callable[..., Page]
) -> None:
    """Another rule's coefficients and its cost show while it is typed; a click adds the average."""
    page = open_page(f"{site}/runs/{finished_run(store).run_id}")
    before = picture_of(page, "#chart-timeline canvas")

    page.get_by_label("Rule").fill("ema:half_life=40")

    expect(page.locator("#prediction")).to_contain_text("checkpoints. Exact")
    assert picture_of(page, "#chart-timeline canvas") != before
    page.get_by_role("button", name="Build it").click()
    expect(page.get_by_role("navigation", name="Averages").get_by_text("ema-half-life-40")).to_be_visible()


def test_a_wrong_rule_is_explained(
    site: str, store: MemoryStore, open_page: Callable[..., Page], complaints: list[str]
) -> None:
    """Bad input 24 in the page: a rule that cannot be is refused in words beside it, and cannot be built."""
    page = open_page(f"{site}/runs/{finished_run(store).run_id}")

    page.get_by_label("Rule").fill("ema:half_life=0")

    expect(page.locator("#prediction")).to_contain_text("half_life")
    expect(page.get_by_label("Rule")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("button", name="Build it")).to_be_disabled()
    complaints[:] = [text for text in complaints if "422" not in text]


@pytest.mark.parametrize(
    ("button", "drawn"), [("Along the line", "#chart-line canvas"), ("In the plane", "#chart-plane")]
)
def test_the_loss_around_the_average_is_measured_on_request(
    site: str, store: MemoryStore, open_page: Callable[..., Page], button: str, drawn: str
) -> None:
    """A landscape is asked for by a click, waited for, and drawn, with a table of the same numbers."""
    run = finished_run(store)
    page = open_page(f"{site}/runs/{run.run_id}")

    page.get_by_role("button", name=button).click()
    expect(page.locator("#landscape-state")).to_contain_text("Waiting for its turn")
    eventually(lambda: measure_landscapes(run, "swa"), what="a landscape that is wanted")

    expect(page.locator(drawn)).to_be_visible()
    assert num_colours(page, drawn) > 4
    page.locator("details:visible").first.locator("summary").click()
    expect(page.locator("details:visible table").first).to_contain_text("0.0")


def test_what_is_downloaded_is_what_the_page_says(
    site: str, store: MemoryStore, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    """The downloaded file has the digest that the page shows."""
    page = open_page(f"{site}/runs/{finished_run(store).run_id}")
    digest = page.locator("#verdict dd.id").get_attribute("title")

    with page.expect_download() as started:
        page.locator("#download").click()
    started.value.save_as(tmp_path / "average")

    assert hashlib.sha256((tmp_path / "average").read_bytes()).hexdigest() == digest


def test_an_average_is_verified_from_the_page(
    site: str, store: MemoryStore, open_page: Callable[..., Page]
) -> None:
    """A click has an averager recompute the average; progress, finding and time are shown, and stay known."""
    run = finished_run(store)
    page = open_page(f"{site}/runs/{run.run_id}")
    page.get_by_role("button", name="Verify").click()
    dialog = page.get_by_role("dialog")

    dialog.get_by_role("button", name="Verify now").click()

    expect(dialog.get_by_role("status")).to_contain_text("Waiting for an averager")
    expect(dialog.get_by_role("button", name="Verify now")).to_be_disabled()
    assert eventually(lambda: verify_averages(run, "swa"), what="a verification that is wanted") == 1
    expect(dialog.get_by_role("status")).to_contain_text("equal to the last bit")
    expect(dialog.get_by_role("status")).to_contain_text("in 3.2")
    dialog.get_by_role("button", name="Close").click()
    expect(page.locator("#verify")).to_have_text("Verified")
    page.reload()
    expect(page.locator("#verify")).to_have_text("Verified")


@pytest.mark.parametrize("path", ["/runs/01ARZ3NDEKTSV4RRFFQ69G5FAV", "/runs/x", "/runs/%3Cscript%3E"])
def test_a_wrong_id_has_a_friendly_page(
    site: str, open_page: Callable[..., Page], complaints: list[str], path: str
) -> None:
    """Bad inputs 4 and 5 in a browser: an unknown run is a page that says so and leads back to the list."""
    page = open_page(site + path)

    expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()
    page.get_by_role("link", name="All runs").click()
    expect(page.get_by_role("heading", name="Runs", exact=True)).to_be_visible()
    assert all("404" in complaint for complaint in complaints)
    complaints.clear()


def num_colours(page: Page, canvas: str) -> int:
    """How many different colours a canvas holds: 1 when nothing was drawn."""
    count: int = page.locator(canvas).evaluate(
        """canvas => new Set(new Uint32Array(
            canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
    )
    return count


def picture_of(page: Page, canvas: str) -> str:
    """What a canvas shows."""
    shown: str = page.locator(canvas).evaluate("canvas => canvas.toDataURL()")
    return shown
