"""The averager's working space: bounded, its own, and cleaned after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from services.averager.scratch import Scratch

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import sys, time
from pathlib import Path
from services.averager.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.folder / "big").write_bytes(b"x")
print(scratch.folder, flush=True)
time.sleep(600)
"""


def test_memory_is_given_out_up_to_the_limit(tmp_path: Path) -> None:
    """Accumulators beyond the limit go to files; what is given back can be had again."""
    with Scratch(tmp_path, memory_bytes=100) as scratch:
        assert scratch.place("a", 60) is None
        assert scratch.place("b", 60) == scratch.folder
        assert scratch.place("a", 100) is None
        scratch.release("a")
        assert scratch.place("b", 60) is None


def test_the_end_removes_everything(tmp_path: Path) -> None:
    """Nothing is left behind by an averager that ends."""
    with Scratch(tmp_path) as scratch:
        (scratch.new_folder("assess-") / "file").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_averager_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """The next one to start cleans up after a SIGKILL, and never touches what is in use."""
    children = [
        subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        dead, living = (tmp_path / (child.stdout.readline().strip() if child.stdout else "") for child in children)
        children[0].send_signal(signal.SIGKILL)
        children[0].wait()
        with Scratch(tmp_path):
            assert not dead.exists()
            assert (living / "big").exists()
    finally:
        for child in children:
            child.kill()
            child.communicate()
