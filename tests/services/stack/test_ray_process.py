"""Ray's head ends as soon as it is asked to; ending by itself, it is told by its own status."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from services.stack.leftovers import kill_all, reference, session_members
from support.patience import eventually

if TYPE_CHECKING:
    from pathlib import Path

KEEPER = (sys.executable, "-m", "services.stack.ray_process")
DEAF = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


def test_f28_what_would_outstay_any_grace_is_not_waited_for(tmp_path: Path) -> None:
    """F28: SIGTERM ends it with 0 at once; what it ran is in its session, where the supervisor finds it."""
    ready = tmp_path / "ready"
    code = f"{DEAF} pathlib.Path({str(ready)!r}).touch(); time.sleep(600)"
    keeper = subprocess.Popen([*KEEPER, sys.executable, "-c", code], start_new_session=True)
    leader = reference(keeper.pid)
    try:
        eventually(ready.exists, timeout_s=30, what="the deaf child")
        keeper.send_signal(signal.SIGTERM)

        assert keeper.wait(timeout=10) == 0
    finally:
        keeper.kill()
        killed = kill_all(lambda: session_members(leader))
    assert len(killed) == 1


def test_a_head_that_ends_by_itself_is_told_by_its_status() -> None:
    """What cannot start is not taken for what was stopped."""
    assert subprocess.run([*KEEPER, sys.executable, "-c", "raise SystemExit(7)"], check=False).returncode == 7
