"""The pages lead where they say: to files that are there, and to their headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]+))?\)")
NAMED = re.compile(r"`((?:wa_core|services|tests|benchmarks|deploy|docs|examples)/[\w./-]+)`")
PAGES = sorted(
    page.relative_to(ROOT) for at in ("*.md", "docs/**/*.md", "deploy/**/*.md") for page in ROOT.glob(at)
)


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_and_every_path_that_is_named_leads_somewhere(page: Path) -> None:
    """Relative links lead to files and headings that there are, and so do paths in backticks."""
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    for target, anchor in LINK.findall(text):
        found = (folder / target).resolve() if target else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page} links to {target}#{anchor}"
    for named in NAMED.findall(text):
        assert (ROOT / named).exists(), f"{page} names {named}"
