"""Whole processes, measured: wall time and peak memory, several kinds in turn.

The measuring process stays small on purpose: a child inherits its parent's peak memory at the fork.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process took: seconds from start to end, and of processors; peak memory; and what it printed."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    output: str


def run(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Usage:
    """Run a program to its end, with byte code kept, as an installed program has it.

    Raises:
        RuntimeError: it failed; the message holds its last words.
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as output:
        # Ours runs from a checkout: without its byte code it would be compiled anew in every process.
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **(env or {})}
        begin = time.perf_counter()
        process = subprocess.Popen(list(argv), stdout=output, stderr=errors, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        output.seek(0)
        if process.returncode:
            raise RuntimeError(f"{argv}: exit {process.returncode}\n{errors.read().decode()[-2000:]}")
        return Usage(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output.read().decode())


def alternate(kinds: Mapping[str, Callable[[], Usage]], *, rounds: int) -> dict[str, list[Usage]]:
    """Every kind once per round, each round beginning with another one."""
    found: dict[str, list[Usage]] = {name: [] for name in kinds}
    names = list(kinds)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            os.sync()  # what the last one left to write must not slow the next one down
            usage = kinds[name]()
            print(
                f"{name}: {usage.wall_s:.2f} s ({usage.cpu_s:.2f} s of CPU), {usage.peak_rss_bytes / 1e6:.0f} MB",
                file=sys.stderr,
            )
            found[name].append(usage)
    return found


def summary(found: Mapping[str, Sequence[Usage]]) -> dict[str, Any]:
    """Median and single wall times, and the largest peak memory, by kind."""
    return {
        name: {
            "median_s": median(usage.wall_s for usage in usages),
            "wall_s": [usage.wall_s for usage in usages],
            "cpu_s": [usage.cpu_s for usage in usages],
            "peak_rss_bytes": max(usage.peak_rss_bytes for usage in usages),
        }
        for name, usages in found.items()
    }
