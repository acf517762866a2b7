"""What the cluster has, as a process beside the runner says it. The watcher is scripted here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from services.trainer.cluster import ThisMachine, WatchedCluster
from support.patience import eventually

if TYPE_CHECKING:
    from pathlib import Path


def scripted(code: str) -> tuple[str, ...]:
    """A watcher that does something else."""
    return (sys.executable, "-c", code)


def test_the_last_word_of_the_watcher_counts(tmp_path: Path) -> None:
    """Nothing is known before it has said something, then what it said last; a spoiled line is passed over."""
    gate = tmp_path / "gate"
    lines = f"""import os, time
while not os.path.exists({str(gate)!r}): time.sleep(0.01)
print('{{"CPU": 1}}\\n{{"CPU": 8', end='', flush=True); print('\\n{{"CPU": 4, "GPU": 2}}', flush=True)
time.sleep(600)"""
    cluster = WatchedCluster(command=scripted(lines))
    try:
        assert cluster.totals() is None
        gate.touch()
        eventually(lambda: (cluster.totals() or {}).get("CPU") == 4, what="its last word")
        assert cluster.totals() == {"CPU": 4, "GPU": 2}
    finally:
        cluster.close()


def test_a_watcher_ends_with_close() -> None:
    """No process is left."""
    cluster = WatchedCluster(command=scripted("import time; time.sleep(600)"))
    process = cluster._process

    cluster.close()

    assert process is not None
    assert process.poll() is not None


def test_without_a_cluster_it_is_this_machine() -> None:
    """A driver that starts a Ray of its own has the processors of the machine; GPUs are left for Ray to count."""
    assert (ThisMachine().totals() or {})["CPU"] >= 1
