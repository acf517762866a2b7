"""Fixtures that any test may ask for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from support.seaweed import Seaweed, running_seaweed

if TYPE_CHECKING:
    from collections.abc import Iterator


# Where CI decides, the same examples every time; everywhere else new ones are looked for at every run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is simulated in `tests/chaos/test_simulation.py`, and where the page's pictures are kept."""
    parser.addoption("--sim-seeds", type=int, default=20_000, help="how many schedules to simulate")
    parser.addoption("--pictures", default=None, help="keep the pictures of the page here (docs/images)")
    parser.addoption("--sim-seed", type=int, default=None, help="tell this one's story")


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """One real SeaweedFS for the whole session; `seaweed.new_store()` gives each test a bucket of its own."""
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server
