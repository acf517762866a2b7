from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from support.stack import submission

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from playwright.sync_api import Page

    from support.stack import RunningStack

pytestmark = [pytest.mark.stack, pytest.mark.browser]

AVERAGES = [{"name": "swa", "rule": "swa:start_step=40"}, {"name": "ema", "rule": "ema:half_life=40"}]
SOON_MS = 240_000


@pytest.mark.timeout(900)  # beside other tests on two cores
def test_a_run_is_watched_explored_and_downloaded(
    stack: RunningStack, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    """On the real stack a person signs in, watches a run, measures a landscape, builds, verifies, downloads."""
    with stack.client() as client:
        run_id = client.submit(submission(config={"epochs": 4, "lr": 0.1}, averages=AVERAGES))["run_id"]
    page = open_page(stack.said["api_url"])
    page.get_by_label("Token").fill(stack.said["token"])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name=run_id[-8:]).click()

    # (a) to (f), without the page being loaded again
    expect(page.locator("#run-head .state")).to_have_text("succeeded", timeout=SOON_MS)
    expect(page.get_by_test_id("difference")).to_be_visible(timeout=SOON_MS)
    expect(page.locator("#generations time").first).to_be_visible()
    for element in ("#layers", "#batchnorm"):
        assert page.locator(f"{element} .bar").count() >= 2, element
    assert page.locator("#checkpoints .fate-folded").count() >= 3
    expect(page.locator("#metric-names button")).to_have_text(["loss", "accuracy"])

    page.get_by_role("button", name="Along the line").click()  # (g)
    expect(page.locator("#chart-line canvas")).to_be_visible(timeout=SOON_MS)

    page.get_by_label("Rule").fill("window:last=3")  # (h)
    page.get_by_role("button", name="Build it").click()
    page.get_by_role("link", name="window-last-3").click(timeout=SOON_MS)
    expect(page.get_by_test_id("difference")).to_be_visible(timeout=SOON_MS)

    page.get_by_role("button", name="Verify").click()
    page.get_by_role("button", name="Verify now").click()
    expect(page.locator("#verify-state")).to_contain_text("equal to the last bit", timeout=SOON_MS)
    page.get_by_role("button", name="Close").click()

    digest = page.locator("#verdict dd.id").get_attribute("title")
    with page.expect_download() as started:
        page.locator("#download").click()
    started.value.save_as(tmp_path / "average")
    assert hashlib.sha256((tmp_path / "average").read_bytes()).hexdigest() == digest
