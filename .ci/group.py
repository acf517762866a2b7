"""Runs a group of the tests, and what failed in it once more, alone in a fresh process.

It does not know what is tested, or how: its arguments are pytest's. A test that fails twice fails the group, and
one that passes alone is named at the end. Only tests that failed are tried again, and only a few: the group fails
at once if a test cannot be collected, a worker dies, the run is interrupted, or many tests fail.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

MAX_TRIED_AGAIN = 5


class Failures:
    """What failed, as the process hears of it that hands out the tests."""

    def __init__(self) -> None:
        self.tests: list[str] = []
        self.is_broken = False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is no test that failed."""
        self.is_broken |= report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test may fail more than once: as it runs, and as it ends."""
        if report.failed and report.nodeid not in self.tests:
            self.tests.append(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self) -> None:
        """A worker that dies takes other tests with it."""
        self.is_broken = True


def main(arguments: list[str]) -> int:
    """Run the group; 0 if every test passed, at first or alone."""
    failures = Failures()
    status = pytest.main(arguments, plugins=[failures])
    tests = failures.tests
    if status != pytest.ExitCode.TESTS_FAILED or failures.is_broken or not 0 < len(tests) <= MAX_TRIED_AGAIN:
        return int(status)
    print(f"\n{len(tests)} failed; once more, alone:", *tests, sep="\n  ", flush=True)
    again = subprocess.run([sys.executable, "-m", "pytest", *tests], check=False).returncode
    if again == 0:
        print("\nFAILED AT FIRST, PASSED ALONE (each is a bug, see CONTRIBUTING.md):", *tests, sep="\n  ")
    return again


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
