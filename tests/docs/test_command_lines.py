"""Every `wa` line in README and the guides can be typed: the command and its options are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from services.cli.main import _PANELS, build_app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "guides").rglob("*.md"))]
GUIDE = DOCS / "guides" / "cli.md"


def typed_in(page: Path) -> list[list[str]]:
    """The words of each `wa` command in the page's blocks of shell."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```(?:sh|bash|console)?\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    return [
        shlex.split(part, comments=True)
        for line in lines
        for part in line.split(";")
        if part.strip().startswith("wa ")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_to_type_exists(page: Path) -> None:
    """No page teaches a command or an option that is gone."""
    root = typer.main.get_command(build_app())
    commands = {**root.commands, None: root}  # type: ignore[attr-defined]

    for words in typed_in(page):
        name = words[1] if not words[1].startswith("-") else None
        assert name in commands, f"{page.name}: {' '.join(words)}"
        inner = getattr(commands[name], "commands", {})  # of `wa tokens create` and the like
        command = inner.get(words[2] if words[2:] else "", commands[name])
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        assert given <= known, f"{page.name}: {' '.join(words)}"


def test_the_guide_names_every_command() -> None:
    """A reader of the guide has met every command."""
    text = GUIDE.read_text(encoding="utf-8")

    missing = [name for commands in _PANELS.values() for name in commands if not re.search(rf"\b{name}\b", text)]
    assert missing == []
