"""Fixtures that any test may ask for."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from support.browsing import browser, complaints, open_page  # noqa: F401  fixtures
from support.seaweed import Seaweed, running_seaweed
from support.stack import RunningStack, down, up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xdist.remote import Producer
    from xdist.workermanage import WorkerController


# `make test` looks at the same examples every time; by hand every run looks for new ones. None has to hurry.
settings.register_profile(
    "unhurried",
    derandomize="CI" in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is simulated in `tests/chaos/test_simulation.py`, and where the page's pictures are kept."""
    parser.addoption("--sim-seeds", type=int, default=2_000, help="how many schedules to simulate")
    parser.addoption("--pictures", default=None, help="keep the pictures of the page here (docs/images)")
    parser.addoption("--sim-seed", type=int, default=None, help="tell this one's story")


#: Longest first, so that in the end no process works alone; after these come the files with most tests.
LONGEST = (
    "tests/e2e",
    "tests/chaos/test_simulation.py",
    "tests/chaos/test_process_faults.py",
    "tests/services/trainer/test_several_nodes.py",
    "tests/services/stack/test_stack_real.py",
    "tests/services/averager/test_assess_on_ray.py",
    "tests/chaos/test_wire_faults.py",
    "tests/services/trainer/test_trainer_on_ray.py",
    "tests/chaos/test_soak.py",
    "tests/wa_core/averaging/files/test_foreign.py",
    "tests/services/averager/test_assessor.py",
    "tests/services/trainer/test_run_life.py",
    "tests/services/averager/test_landscaper.py",
    "tests/services/averager/test_verifier.py",
    "tests/services/trainer/test_churn.py",
    "tests/services/trainer/test_exact_resume.py",
    "tests/services/api/test_api_killed.py",
    "tests/services/api/test_api_description.py",
    "tests/wa_core/averaging/test_bad_checkpoints.py",
    "tests/services/cli/test_cli_export.py",
)


def pytest_collection_finish() -> None:
    """What is imported by now stays; to look through it for garbage again and again would take long."""
    gc.collect()
    gc.freeze()


class SideBySide(LoadFileScheduling):
    """With `-n`, a file stays in one process, and so do all files that share the embedded stack."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/e2e" if nodeid.startswith("tests/e2e/") else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        longest = next((scope for scope in LONGEST if scope in self.workqueue), None)
        if longest:
            self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SideBySide:
    """What `-n` uses."""
    return SideBySide(config, log)


def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own is the same at every run, whatever ran before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_runtest_teardown() -> None:
    """What one test imports of the example's package is not there for the next one."""
    if sys.modules.pop("moons", None) is not None:
        sys.path[:] = [entry for entry in sys.path if not entry.endswith("examples/moons")]


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
