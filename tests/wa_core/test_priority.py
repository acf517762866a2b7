"""Processes that let others go first do so in their own session, and lower nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_GROUP = Path("/proc/self/autogroup")
_PROGRAM = """
import os
from pathlib import Path
from wa_core.priority import give_way

give_way(niceness=19)
print(os.nice(0), Path("/proc/self/autogroup").read_text().split()[-1])
"""

pytestmark = pytest.mark.skipif(
    not _GROUP.exists() or "autogroup" not in _GROUP.read_text(), reason="this kernel does not group sessions"
)


def told_by_a_child(*, start_new_session: bool) -> str:
    """Its niceness and its session's, after it has given way."""
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        start_new_session=start_new_session,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_a_session_of_its_own_is_lowered_too() -> None:
    """Beside a trainer in another session, niceness alone would change nothing."""
    assert told_by_a_child(start_new_session=True) == "19 19"


def test_a_session_that_others_share_is_left_alone() -> None:
    """A process that was started into somebody's session lowers itself alone."""
    before = _GROUP.read_text()

    niceness, of_session = told_by_a_child(start_new_session=False).split()

    assert (niceness, of_session) == ("19", before.split()[-1])
    assert _GROUP.read_text() == before
