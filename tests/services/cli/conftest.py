"""Fixtures of the command's tests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from support.command import TOKEN, Service, Wa, serving
from support.command_nursery import CommandNursery

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def service() -> Iterator[Service]:
    """A scripted service that wants the token `TOKEN`."""
    found = Service()
    with serving(found):
        yield found


@pytest.fixture(scope="session")
def nursery() -> Iterator[CommandNursery]:
    """Where the commands come from."""
    with CommandNursery() as nursery:
        yield nursery


@pytest.fixture
def lonely_wa(tmp_path: Path, nursery: CommandNursery) -> Wa:
    """The command without any service."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WA_")}
    return Wa(tmp_path, environment | {"WA_API_URL": "http://127.0.0.1:9"}, nursery)


@pytest.fixture
def wa(lonely_wa: Wa, service: Service) -> Wa:
    """The command, pointed to the scripted service."""
    return lonely_wa.with_variables(WA_API_URL=service.url, WA_TOKEN=TOKEN)
