"""Folding one checkpoint from S3 (a real SeaweedFS on this machine), beside downloading it.

`python -m benchmarks.store_fold` puts one checkpoint into the store and, in turn, downloads it in several plain
ways, folds it into one and into four averages, and does what the usual script does: download, `load_file`, lerp.
Then the same behind a proxy that lets 0.33 GB/s through and counts bytes. Seconds are those of the work itself,
without starting Python. Writes `benchmarks/results/store_fold-SIZE.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import checkpoints, processes, results
from benchmarks.offline_merge import write_in_child
from benchmarks.peers import SCRIPTS, python_of
from services.stack import seaweedfs
from services.stack.seaweedfs import SeaweedConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LINK_BYTES_PER_S = 0.33e9
KEY = "checkpoint/model.safetensors"
CURL = ["curl", "--silent", "--show-error", "--fail"]
DOWNLOADS = ("curl to nowhere", "curl to nowhere, 2 ranges", "curl to a file", "boto3 to a file")
USUAL = "boto3 to a file, load_file, lerp"


@contextmanager
def running_store(folder: Path, *, niceness: int = 0) -> Iterator[SeaweedConfig]:
    """A server of our own, ended by its process."""
    ports = seaweedfs.free_ports(seaweedfs.NUM_PORTS)
    secret = secrets.token_hex(16)
    config = SeaweedConfig(data_dir=folder / "store", ports=ports, access_key="bench", secret_key=secret)
    config.data_dir.mkdir()
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            ["nice", "-n", str(niceness), *seaweedfs.argv(config)],
            env=os.environ | seaweedfs.environment(config),
            stdout=log,
            stderr=log,
        )
        try:
            seaweedfs.wait_until_ready(config, timeout_s=60, is_alive=lambda: process.poll() is None)
            yield config
        finally:
            process.terminate()
            process.wait()


@contextmanager
def throttled(config: SeaweedConfig, counted: list[int]) -> Iterator[str]:
    """The URL of a slow link to the server; afterwards, the bytes that went through are in `counted`."""
    (port,) = seaweedfs.free_ports(1)
    argv = [sys.executable, "-m", "benchmarks.throttle", str(port), str(config.ports[0]), str(LINK_BYTES_PER_S)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        wait_until_listening(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
        counted.append(int(output))


def wait_until_listening(port: int) -> None:
    """Until somebody takes connections, for 20 seconds at most."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)


class Kinds:
    """The commands, for one endpoint."""

    def __init__(self, config: SeaweedConfig, endpoint_url: str, folder: Path, checkpoint: Path) -> None:
        self._access = [endpoint_url, config.access_key, config.secret_key, config.bucket, KEY]
        self._folder, self._checkpoint = folder, checkpoint
        from wa_core.store.s3 import S3Store

        store = S3Store(
            bucket=config.bucket,
            endpoint_url=endpoint_url,
            access_key=config.access_key,
            secret_key=config.secret_key,
        )
        self._url = str(store.presign(KEY, expires_s=3_600))

    def download(self, kind: str) -> float:
        """Seconds of a plain download."""
        path = self._folder / "download"
        path.unlink(missing_ok=True)
        if kind == "boto3 to a file":
            argv = [python_of("torch"), str(SCRIPTS / "download.py"), *self._access, str(path)]
            return float(json.loads(processes.run(argv).output)["seconds"])
        if kind == "curl to nowhere, 2 ranges":
            middle = self._checkpoint.stat().st_size // 2
            ends = (f"0-{middle - 1}", f"{middle}-")
            begin = time.perf_counter()
            both = [subprocess.Popen([*CURL, "-r", end, "-o", os.devnull, self._url]) for end in ends]
            assert [process.wait() for process in both] == [0, 0]
            return time.perf_counter() - begin
        output = os.devnull if kind == "curl to nowhere" else str(path)
        return processes.run([*CURL, "-o", output, self._url]).wall_s

    def usual(self) -> float:
        """Seconds of download, load and lerp."""
        path = self._folder / "download"
        path.unlink(missing_ok=True)
        argv = [python_of("torch"), str(SCRIPTS / "download.py"), *self._access, str(path), str(self._checkpoint)]
        return float(json.loads(processes.run(argv).output)["seconds"])

    def fold(self, num_averages: int, *, digests: bool = False) -> tuple[float, int]:
        """Seconds of our fold, and the bytes of data that it asked for."""
        argv = [
            sys.executable,
            "-m",
            "benchmarks.fold_object",
            *self._access,
            str(num_averages),
            str(int(digests)),
        ]
        found = json.loads(processes.run(argv).output)
        return float(found["seconds"]), int(found["read_bytes"])


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Seconds of every kind, on the plain and on the slow link, and bytes."""
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as name:
        folder = Path(name)
        checkpoint = write_in_child(folder / "model", size, "float32", seed=0)
        with running_store(folder) as config:
            with checkpoint.open("rb") as file:
                seaweedfs.open_store(config).put(KEY, file)
            direct = Kinds(config, config.endpoint_url, folder, checkpoint)
            work: dict[str, Callable[[], float]] = {
                kind: lambda kind=kind: direct.download(kind)  # type: ignore[misc]
                for kind in DOWNLOADS
            }
            work |= {
                "fold into 1 average": lambda: direct.fold(1)[0],
                "fold into 4 averages": lambda: direct.fold(4)[0],
                "fold into 4 averages, sha256": lambda: direct.fold(4, digests=True)[0],
                USUAL: direct.usual,
            }
            seconds = alternate(work, rounds)
            counted: list[int] = []
            with throttled(config, counted) as url:
                link = Kinds(config, url, folder, checkpoint)
                slow = alternate(
                    {
                        "curl to nowhere": lambda: link.download("curl to nowhere"),
                        "fold into 1 average": lambda: link.fold(1)[0],
                        "fold into 4 averages": lambda: link.fold(4)[0],
                    },
                    rounds,
                )
            with throttled(config, counted) as url:
                # Two folds of the same object: the first one copies.
                _, read_bytes = Kinds(config, url, folder, checkpoint).fold(4)
        return {
            "size_bytes": checkpoint.stat().st_size,
            "rounds": rounds,
            "seconds": seconds,
            "slow_link_bytes_per_s": LINK_BYTES_PER_S,
            "slow_link_seconds": slow,
            "read_bytes_of_a_fold": read_bytes,
            "bytes_on_the_wire_of_two_folds": counted[1],
        }


def alternate(work: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every kind once per round, each round beginning with another one."""
    found: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(work[name]())
            print(f"{name}: {found[name][-1]:.2f} s", file=sys.stderr)
    return found


def markdown(data: dict[str, Any]) -> str:
    """The tables that people read."""
    seconds = {kind: median(values) for kind, values in data["seconds"].items()}
    slow = {kind: median(values) for kind, values in data["slow_link_seconds"].items()}
    fastest = min(seconds[kind] for kind in DOWNLOADS)
    size = data["size_bytes"] / 1e9
    rows = [
        [kind, f"{value:.2f} s", f"{size / value:.2f} GB/s", f"{value / fastest:.2f}"]
        for kind, value in seconds.items()
    ]
    slow_rows = [
        [kind, f"{value:.2f} s", f"{value / slow['curl to nowhere']:.2f}"] for kind, value in slow.items()
    ]
    wire = data["bytes_on_the_wire_of_two_folds"] / 2 / data["size_bytes"]
    return (
        f"One checkpoint of {size:.2f} GB float32 in SeaweedFS on this machine; medians of {data['rounds']}. The "
        f"ratio is to the fastest plain download.\n\n{results.table(['', 'time', 'rate', 'ratio'], rows)}\n"
        f"Behind a link of {data['slow_link_bytes_per_s'] / 1e9:.2f} GB/s:\n\n"
        f"{results.table(['', 'time', 'ratio'], slow_rows)}\n"
        f"Bytes on the wire per fold: {wire:.4f} times the object's size (with headers of HTTP).\n"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=checkpoints.SIZES, default="350M")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    data = measure(options.size, options.rounds)
    results.write(f"store_fold-{options.size}", data=data, text=markdown(data))


if __name__ == "__main__":
    main()
