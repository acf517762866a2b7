"""Fixtures that any test may ask for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from support.browsing import browser, complaints, open_page  # noqa: F401  fixtures
from support.seaweed import Seaweed, running_seaweed
from support.stack import RunningStack, down, up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xdist.remote import Producer


# Where CI decides, the same examples every time; everywhere else new ones are looked for at every run.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is simulated in `tests/chaos/test_simulation.py`, and where the page's pictures are kept."""
    parser.addoption("--sim-seeds", type=int, default=4_000, help="how many schedules to simulate")
    parser.addoption("--pictures", default=None, help="keep the pictures of the page here (docs/images)")
    parser.addoption("--sim-seed", type=int, default=None, help="tell this one's story")


class SideBySide(LoadFileScheduling):
    """With `-n`, a file stays in one process, and so do all files that share the embedded stack."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/e2e" if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SideBySide:
    """What `-n` uses."""
    return SideBySide(config, log)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """One real SeaweedFS for the whole session; `seaweed.new_store()` gives each test a bucket of its own."""
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """The embedded stack for the whole session: SeaweedFS, Ray, runner, averager and API, all real."""
    data = tmp_path_factory.mktemp("stack")
    try:
        yield up(data)
    finally:
        down(data)
