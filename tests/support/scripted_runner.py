"""Runner processes with scripted drivers: everything but the training is real, and each is killed at will.

``python -m support.scripted_runner FOLDER VERBS …`` is the process; it works in a bucket that is a folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from support.nursery import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

NUM_PLACES = 6
NUM_CPUS = 12
POLL_S = 0.05


@dataclass
class ScriptedRunners:
    """Starts runners for one bucket; a context manager whose end stops those that are left.

    Args:
        folder: holds the bucket, the logs, and the folder for temporary files.
        verbs: the script of every run's attempts.
    """

    folder: Path
    verbs: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def bucket(self) -> Path:
        """The bucket's folder."""
        return self.folder / "bucket"

    @property
    def temporary(self) -> Path:
        """Where the runners and all below them make temporary files."""
        return self.folder / "tmp"

    def __enter__(self) -> Self:
        self.temporary.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def start(self) -> subprocess.Popen[bytes]:
        """Start another one."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment: Mapping[str, str] = {"PYTHONPATH": paths, "TMPDIR": str(self.temporary)}
        log = self.folder / f"runner-{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "support.scripted_runner", str(self.bucket), self.verbs],
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
            )
        self.processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """SIGTERM; the exit status."""
        process.send_signal(signal.SIGTERM)
        return process.wait(60)


def main() -> int:
    """Run until stopped."""
    from services.runtime.folder import OwnFolder
    from services.runtime.lifecycle import Stop, run_ticks
    from services.runtime.telemetry import configure_logging
    from services.trainer.held import Graces
    from services.trainer.identity import new_runner_id
    from services.trainer.runner import Runner, RunnerConfig
    from support import scripted_driver
    from wa_core.clock import SystemClock
    from wa_core.store.local import LocalStore

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("verbs")
    options = parser.parse_args()
    configure_logging("runner", log_format="json")
    stop, folder = Stop().install(), OwnFolder("wa-runner-")
    config = RunnerConfig(
        new_runner_id(),
        max_concurrent_runs=NUM_PLACES,
        driver=(sys.executable, scripted_driver.__file__, str(options.folder), options.verbs),
        folder=folder.path,
        look_around_interval_s=0.2,
        graces=Graces(cancel_s=5.0, start_cancel_s=1.0, interrupt_s=1.0, terminate_s=1.0),
    )
    runner = Runner(LocalStore(options.folder), config, SystemClock(), totals=lambda: {"CPU": NUM_CPUS})
    run_ticks(runner.tick, stop=stop, interval_s=POLL_S)
    runner.shut_down()
    folder.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
