"""Being told to stop, whatever a process does at that moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

from services.runtime.lifecycle import Stop
from support.nursery import ROOT

NUM_PROCESSES = 10
WAITING = """
from services.runtime.lifecycle import Stop
stop = Stop().install()
print("waiting", flush=True)
while not stop.wait(0):
    pass
"""


def test_f28_a_signal_may_come_at_any_moment() -> None:
    """F28: SIGTERM while the process is about to wait, or about to wake, ends it as at any other moment."""
    processes = [
        subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, cwd=ROOT)
        for _ in range(NUM_PROCESSES)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        found = [process.wait(20) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()

    assert found == [0] * NUM_PROCESSES


def test_whoever_waits_is_woken() -> None:
    """Each of several waiting threads wakes at once, and whoever asks later need not wait; till then, all wait."""
    stop = Stop()
    assert not stop.wait(0.01)
    woken: list[bool] = []
    threads = [threading.Thread(target=lambda: woken.append(stop.wait(600))) for _ in range(4)]
    for thread in threads:
        thread.start()
    stop.set()
    for thread in threads:
        thread.join(60)

    assert (woken, stop.wait(600), stop.is_set) == ([True] * 4, True, True)
