"""Prints the requirements of the `pyproject.toml` in the current folder, and of the extras named as arguments.

An image installs these before it copies the code: a change of code then leaves that layer alone.
"""

# ruff: noqa: INP001  copied into images as a script, not imported

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """The base requirements, then those of each extra.

    Raises:
        SystemExit: an extra is not in the project.
    """
    optional = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        raise SystemExit(f"pyproject.toml has no extra {unknown[0]!r}; it has {', '.join(optional)}")
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def main(extras: list[str]) -> None:
    """Print them."""
    with Path("pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    sys.stdout.writelines(f"{line}\n" for line in requirements(project, extras))


if __name__ == "__main__":
    main(sys.argv[1:])
