"""`wa bench`: how fast this machine averages, and the bucket and the service answer. Half a minute at most.

It measures what users wait for, on what they have: folding files (the command of the same name), storing and
reading a checkpoint, committing a record, listing runs. Comparisons with other programs are in `benchmarks/`.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.bucket import open_bucket
from services.cli.connection import DEFAULT_DATA, connect
from services.cli.console import print_json, print_table, say
from services.cli.options import ApiUrl, AsJson, Token
from wa_core.errors import ConfigurationError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wa_core.store.base import ObjectStore

_NUM_FILES = 8
_NUM_CALLS = 20
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured."""

    what: str
    value: float
    unit: str


def bench(
    *,
    size: Annotated[int, typer.Option(min=1, max=4096, metavar="MIB", help="Of one checkpoint.")] = 32,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Data folder of the stack to measure.")
    ] = DEFAULT_DATA,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Measure averaging, bucket and service on this machine.

    The bucket is that of the WA_* environment or of the stack of this folder; the service is the one that other
    commands use. What is not there is left out.

    Example: wa bench

    Example: wa bench --size 256 --json
    """
    figures = [*measure_files(size * _MIB)]
    with _left_out("the bucket"):
        figures += measure_bucket(open_bucket(data), size * _MIB)
    with _left_out("the service"):
        figures += measure_service(api_url, token)
    if as_json:
        print_json({"size_mib": size, "figures": [asdict(figure) for figure in figures]})
    else:
        print_table(["WHAT", "", ""], [[each.what, float(f"{each.value:.3g}"), each.unit] for each in figures])


def measure_files(size_bytes: int) -> Iterator[Figure]:
    """`wa average` over files of random weights: the whole command, its start included."""
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
        files = [str(_weights(Path(folder), step, size_bytes)) for step in range(1, _NUM_FILES + 1)]
        command = [sys.executable, "-m", "services.cli", "average", *files, "--rule", "swa", "--no-digests"]
        seconds = _seconds(
            lambda: subprocess.run([*command, "-o", f"{folder}/out.safetensors"], check=True, capture_output=True)
        )
    yield Figure(f"average {_NUM_FILES} files into one", seconds, "s")
    yield Figure("averaging, of what is read", _NUM_FILES * size_bytes / seconds / _MIB, "MiB/s")


def measure_bucket(store: ObjectStore, size_bytes: int) -> Iterator[Figure]:
    """One object as large as a checkpoint, and records as small as commits; all are deleted again."""
    prefix = f"probe/bench-{uuid.uuid4().hex}/"
    keys = [f"{prefix}{number}" for number in range(_NUM_CALLS)]
    body = random.randbytes(size_bytes)  # noqa: S311  bytes to move
    try:
        yield Figure(
            "store a checkpoint", size_bytes / _seconds(lambda: store.put(f"{prefix}x", body)) / _MIB, "MiB/s"
        )
        yield Figure("read it", size_bytes / _seconds(lambda: store.get(f"{prefix}x")) / _MIB, "MiB/s")
        commits = [_seconds(lambda key=key: store.create(key, b"{}")) for key in keys]  # type: ignore[misc]
        yield Figure("commit a record, median", median(commits) * 1000, "ms")
    finally:
        for info in list(store.list(prefix)):
            store.delete(info.key)


def measure_service(api_url: str | None, token: str | None) -> Iterator[Figure]:
    """A page of runs."""
    with connect(api_url, token) as client:
        times = sorted(_seconds(lambda: client.runs(limit=50)) for _ in range(_NUM_CALLS))
    yield Figure("list 50 runs, median", median(times) * 1000, "ms")
    yield Figure(f"list 50 runs, slowest of {_NUM_CALLS}", times[-1] * 1000, "ms")


def _weights(folder: Path, step: int, size_bytes: int) -> Path:
    """A safetensors file of one float32 tensor: random bytes with the exponent of numbers from 0.5 to 2."""
    count = size_bytes // 4
    header = json.dumps({"weight": {"dtype": "F32", "shape": [count], "data_offsets": [0, count * 4]}}).encode()
    body = bytearray(random.randbytes(count * 4))  # noqa: S311  weights of nothing
    body[3::4] = bytes([0x3F]) * count
    path = folder / f"step_{step}.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def _seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


@contextlib.contextmanager
def _left_out(what: str) -> Iterator[None]:
    try:
        yield
    except (ConfigurationError, WeightAveragingError) as error:
        say(f"{what} is left out: {error.message}")
