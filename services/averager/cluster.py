"""The assess process that measures on a Ray cluster: the only file of the averager that imports ray.

`python -m services.averager.cluster --address HOST:PORT` speaks as `services.averager.assess` does, but imports
no user code: that runs in Ray tasks, each with a share of the data (`services.averager.shards`). Weights go
into the cluster once. It has no second way: whatever is amiss, be it the cluster or the recipe, it says that
the job failed, or dies, and its parent has the job done by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from services.averager import shards
from services.averager.assess import NICENESS, describe, write_found
from services.averager.measuring import Trial, finite
from services.averager.protocol import JobDone, JobFailed, JobFile, RawFound, job_path, raw_path, value_path
from services.averager.shards import Part, Setting
from services.runtime.confined import take_stdout, yield_to_others
from wa_core.errors import TransientError
from wa_core.packages import pack_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.averager.measuring import Measured
    from services.averager.protocol import Finding

CPUS_EACH = 1
MIN_PARTS = 2
MAX_PARTS = 32
CONNECT_TIMEOUT_S = 5.0
LOOK_INTERVAL_S = 5.0
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # So long after the control store is gone Ray ends this process; nothing waits for it but its parent.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}


class Sharded:
    """Does jobs one after the other, each as many parts as the cluster has room for."""

    def findings(self, folder: Path) -> Iterator[Finding]:
        """Do the job in `folder`; whatever goes wrong is the last finding."""
        try:
            job = JobFile.model_validate_json(job_path(folder).read_bytes())
            package = pack_folder(Path(job.code)) if job.code else None
            yield from _Job(Setting(job, package), folder).findings()
        except TransientError as error:
            yield JobFailed(message=error.message)
        except Exception as error:  # noqa: BLE001  the cluster and user code may raise anything; the parent goes on
            yield JobFailed(message=describe(error))


class _Job:
    def __init__(self, setting: Setting, folder: Path) -> None:
        import ray

        self._ray = ray
        self._folder = folder
        self._job = setting.job
        num_parts = _num_parts(ray.available_resources())  # type: ignore[no-untyped-call]  # Ray's
        self._parts = [Part(number, num_parts) for number in range(num_parts)]
        self._setting = ray.put(setting)

    def findings(self) -> Iterator[Finding]:
        digest = self._begin(shards.digest)
        iterate = self._put(raw_path(self._folder)) if self._job.has_raw else None
        raw = self._measure(iterate, {}) if iterate is not None else None
        yield RawFound(metrics=finite(raw.metrics) if raw else None, data_sha256=self._wait(digest))
        for name in self._job.averages:
            weights = self._put(value_path(self._folder, name))
            apart = self._begin(shards.distances, weights, iterate) if iterate is not None else None
            trial = self._try(weights)
            layers = self._wait(apart) if apart is not None else []
            yield write_found(self._folder, name, trial, raw, layers=layers)
        yield JobDone()

    def _try(self, weights: Any) -> Trial:  # noqa: ANN401  a reference to them
        before = self._begin(shards.measure_before, weights)
        parts = [self._begin(shards.collect, weights, part) for part in self._parts]
        collected = shards.in_line(self._wait(parts))
        summary, buffers = self._wait(self._begin(shards.settle, weights, collected))
        return Trial(self._wait(before), self._measure(weights, buffers), summary, buffers)

    def _measure(self, weights: Any, buffers: Any) -> Measured:  # noqa: ANN401  as above
        shared = self._ray.put(buffers)
        found = self._wait([self._begin(shards.values_of, weights, shared, part) for part in self._parts])
        if any(values is None for values in found):
            measured: Measured = self._wait(self._begin(shards.measure_whole, weights, shared))
            return measured
        return shards.measured_together(shards.in_line(found))

    def _wait(self, references: Any) -> Any:  # noqa: ANN401  as above
        """What tasks give, which would be waited for without an end when the last node is gone.

        Raises:
            TransientError: there is nobody left to do them.
        """
        while True:
            try:
                return self._ray.get(references, timeout=LOOK_INTERVAL_S)
            except self._ray.exceptions.GetTimeoutError:
                _num_parts(self._ray.cluster_resources())  # type: ignore[no-untyped-call]  # Ray's

    def _put(self, path: Path) -> Any:  # noqa: ANN401  a reference
        # As a plain array over the mapped file, which goes into the object store without a copy on the way.
        return self._ray.put(np.asarray(np.memmap(path, np.uint8, mode="r")))

    def _begin(self, work: Callable[..., object], *arguments: Any) -> Any:  # noqa: ANN401  a reference
        return _task(work).remote(self._setting, *arguments)


@cache
def _task(work: Callable[..., object]) -> Any:  # noqa: ANN401  Ray's
    """Work as a task; Ray tries it anew when its node is lost, for it has changed nothing outside itself."""
    import ray

    return ray.remote(num_cpus=CPUS_EACH, max_retries=1, scheduling_strategy="SPREAD")(work)


def _num_parts(has: dict[str, float]) -> int:
    """How many parts run side by side.

    Raises:
        TransientError: so few that a process of one's own is as quick.
    """
    num_cpus = has.get("CPU", 0)
    if num_cpus < MIN_PARTS * CPUS_EACH:
        needed = MIN_PARTS * CPUS_EACH
        raise TransientError(f"the cluster has {num_cpus:g} CPUs to spare, and assessing there needs {needed}")
    return min(int(num_cpus / CPUS_EACH), MAX_PARTS)


def _connect(address: str) -> None:
    """Join the cluster.

    Raises:
        OSError: nothing listens there.
        ConnectionError: it is no cluster, or no raylet of it runs here.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()  # Ray would try for a minute
    os.environ.update(_RAY_ENVIRONMENT)
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)


def main() -> int:
    """Serve jobs until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m services.averager.cluster")
    parser.add_argument("--address", required=True)
    address = parser.parse_args().address
    yield_to_others(niceness=NICENESS)
    answers = take_stdout()
    try:
        _connect(address)
    except (OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"no cluster at {address}: {error}\n")
        return 1
    sharded = Sharded()
    for line in sys.stdin:
        for finding in sharded.findings(Path(json.loads(line))):
            answers.write(finding.model_dump_json() + "\n")
            answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
