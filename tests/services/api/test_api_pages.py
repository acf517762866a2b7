from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from services.api.dashboard import numbers
from services.api.dashboard.static_files import STATIC
from services.api.dashboard.verdicts import Strip
from support.api import ApiRun
from support.showcase import PWN, finished_run, hostile_run
from wa_core.records import Comparison, Failed

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore

HTML = {"Accept": "text/html"}
AA = 4.5


def test_a_page_loads_nothing_but_this_services_own_files(api: TestClient, store: MemoryStore) -> None:
    """The policy forbids inline scripts and other hosts, and no page would need them."""
    run = finished_run(store)

    for path in ("/", f"/runs/{run.run_id}"):
        page = api.get(path, headers=HTML)
        assert "script-src 'self';" in page.headers["Content-Security-Policy"]
        assert "unsafe" not in page.headers["Content-Security-Policy"]
        assert re.findall(r"<script(?![^>]*src=\"/static/)", page.text) == []
        assert re.findall(r"\son\w+=|\sstyle=|<style", page.text) == []
        assert re.findall(r"(?:src|href|action)=\"https?:", page.text) == []


def test_every_file_that_a_page_names_is_there(api: TestClient, store: MemoryStore) -> None:
    """Scripts, styles and what they import are served to everybody, and asked about again after an upgrade."""
    page = api.get(f"/runs/{finished_run(store).run_id}", headers=HTML).text
    named = set(re.findall(r"/static/([\w./]+)", page)) | {path.name for path in STATIC.glob("*.js")}

    for name in named:
        answer = api.get(f"/static/{name}")
        assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-cache"), name
    assert api.get("/static/../routes.py").status_code == 404


def test_texts_of_users_are_escaped(api: TestClient, store: MemoryStore) -> None:
    """No page holds markup that a user wrote, in whatever field, and no attribute that it would break out of."""
    run = hostile_run(store)

    pages = [
        api.get(path, headers=HTML).text
        for path in ("/", f"/?q={PWN}&label={PWN}&state={PWN}", f"/runs/{run.run_id}", f"/runs/{PWN[:40]}")
    ]

    assert [page.count("<img") + page.count("__pwned=2</script>") for page in pages] == [0, 0, 0, 0]
    assert "&lt;img src=x" in pages[0]


def test_programs_get_problems_and_browsers_get_pages(api: TestClient) -> None:
    """Bad input 4: an unknown run is a problem document, and a page for those who ask for HTML."""
    path = "/runs/01ARZ3NDEKTSV4RRFFQ69G5FAV"

    problem, page = api.get(path), api.get(path, headers=HTML)

    assert (problem.status_code, problem.json()["code"]) == (404, "run_not_found")
    assert (page.status_code, page.headers["Content-Type"]) == (404, "text/html; charset=utf-8")
    assert "There is no such page" in page.text


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("none", "No averages asked for"),
        ("submitted", "Nothing is folded yet"),
        ("failed", "out_of_memory</strong> too large"),
        ("folded", "nothing has been measured yet"),
        ("assessed", ">tie<"),
    ],
)
def test_every_stage_of_a_run_has_its_page(api: TestClient, store: MemoryStore, stage: str, says: str) -> None:
    """A page says how far a run is, however little there is of it, and so does the part that is fetched again."""
    run = ApiRun(store, averages={} if stage == "none" else None)
    if stage in {"failed", "folded", "assessed"}:
        run.start().checkpoint(20)
    if stage == "failed":
        run.log.append(Failed(reason="out_of_memory", message="too large"))
    if stage in {"folded", "assessed"}:
        run.fold(body=b"weights" if stage == "assessed" else None)

    page = api.get(f"/runs/{run.run_id}", headers=HTML)
    part = api.get(f"/runs/{run.run_id}/live", headers=HTML)

    assert (page.status_code, part.status_code) == (200, 200)
    assert says in page.text


def test_what_has_not_changed_is_not_sent_again(api: TestClient, store: MemoryStore) -> None:
    """A page that asks for news of a run gets 204 until there are some."""
    run = ApiRun(store).start()
    page = api.get(f"/runs/{run.run_id}", headers=HTML).text
    seen = re.search(r"seen=(\w+)", page)
    assert seen
    path = f"/runs/{run.run_id}/live?average=swa&seen={seen[1]}"

    unchanged = api.get(path, headers=HTML)
    run.checkpoint(20)
    changed = api.get(path, headers=HTML)

    assert (unchanged.status_code, unchanged.content) == (204, b"")
    assert 'id="checkpoints"' in changed.text
    assert '"step": [20]' in changed.text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0717, "0.0717"),
        (0.99949, "0.999"),
        (9.996, "10.0"),
        (-3.0, f"{numbers.MINUS}3.00"),
        (0, "0"),
        (None, numbers.NOTHING),
        (1e-5, None),
    ],
)
def test_numbers_have_their_significant_digits(value: float | None, shown: str | None) -> None:
    """Numbers show three significant digits, also where rounding adds one, and a real minus sign."""
    expected = shown or f"1.00{numbers.NARROW}\N{MULTIPLICATION SIGN}{numbers.NARROW}10⁻⁵"
    assert numbers.number(value) == expected


def test_sizes_and_durations_have_units() -> None:
    """Sizes are in powers of 1000, durations in their two largest units."""
    shown = [numbers.size(999), numbers.size(1_234_567), numbers.duration(3.21), numbers.duration(200)]

    assert [text.replace(numbers.NARROW, " ") for text in shown] == ["999 B", "1.2 MB", "3.2 s", "3 min 20 s"]
    assert numbers.decimals_for(-0.099, -0.020) == 3


def test_an_interval_is_drawn_beside_zero() -> None:
    """The strip holds the interval and zero, in order and within its line."""
    found = Comparison(metric="loss", difference=-0.05, low=-0.1, high=-0.02, num_samples=9, won="averaged")

    strip = Strip.of(found)

    assert 0 < strip.low < strip.difference < strip.high < strip.zero < 100


@pytest.mark.parametrize("theme", [0, 1])
def test_texts_have_contrast(theme: int) -> None:
    """Every colour that texts have differs from every ground by 4.5 to 1 (WCAG 2, AA), in light and dark."""
    sheet = (STATIC / "page.css").read_text()
    tokens = {
        name: pair.split(", ")[theme] for name, pair in re.findall(r"--([\w-]+): light-dark\(([^)]+)\)", sheet)
    }
    texts = ("text", "muted", "accent", "averaged", "raw", "tie", "good", "bad", "busy", "rejected", "abandoned")

    faint = {
        (text, ground): round(contrast(tokens[text], tokens[ground]), 2)
        for text in texts
        for ground in ("bg", "surface", "sunken")
        if contrast(tokens[text], tokens[ground]) < AA
    }

    assert faint == {}


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, from 1 to 21 (WCAG 2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """The relative luminance of a colour written as #rrggbb (WCAG 2)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
