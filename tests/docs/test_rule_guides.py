"""The guide to the rules says what the code does: spellings, examples and pictures."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from wa_core.averaging.rules import parse_rule

if TYPE_CHECKING:
    from types import ModuleType

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "rules"
PAGES = sorted(GUIDE.glob("*.md"))
SPELLING = re.compile(r"`((?:swa|ema|power|window|lawa):[a-z_]+=[^`…]*)`")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    """The script that draws the pictures."""
    spec = importlib.util.spec_from_file_location("rule_pictures", GUIDE / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_spelling_in_the_guide_is_a_rule(page: Path) -> None:
    """What a page tells people to write is understood."""
    for spelling in SPELLING.findall(page.read_text(encoding="utf-8")):
        parse_rule(spelling)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_example_in_the_guide_runs(page: Path) -> None:
    """A page's Python examples run, and their assertions hold."""
    examples = PYTHON.findall(page.read_text(encoding="utf-8"))
    assert examples
    for example in examples:
        exec(compile(example, str(page), "exec"), {})  # noqa: S102 - our own pages


def test_every_picture_is_of_the_rules_as_they_are(draw: ModuleType) -> None:
    """The pictures are those that draw.py draws now, to the last digit but one, and each is on a page."""
    pictures = draw.pictures()
    shown = {
        name for page in PAGES for name in re.findall(r"\(([a-z-]+\.svg)\)", page.read_text(encoding="utf-8"))
    }

    assert shown == set(pictures) == {path.name for path in GUIDE.glob("*.svg")}
    for name, drawn in pictures.items():
        kept = (GUIDE / name).read_text(encoding="utf-8")
        assert re.sub(r"[0-9.]+", "#", kept) == re.sub(r"[0-9.]+", "#", drawn), f"run {GUIDE / 'draw.py'}"
        numbers = [[float(n) for n in re.findall(r"[0-9]+\.?[0-9]*", text)] for text in (kept, drawn)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.11)


def test_every_page_is_in_the_index() -> None:
    """Each page of the guide is linked from its index, and every link leads somewhere."""
    index = (GUIDE / "README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")
    for page in PAGES:
        for target in re.findall(r"\]\(([a-z.]+)\)", page.read_text(encoding="utf-8")):
            assert (GUIDE / target).exists()
