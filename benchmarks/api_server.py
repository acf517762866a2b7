"""One real API process for the load, and what it takes of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import testbed
from support.training import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.seaweed import Seaweed

assert testbed.TESTS.is_dir()


@dataclass(frozen=True)
class Server:
    """A process that serves at `url`."""

    url: str
    pid: int

    def rss_bytes(self) -> int:
        """Its memory now."""
        return self._status("VmRSS")

    def peak_rss_bytes(self) -> int:
        """The most that it ever had."""
        return self._status("VmHWM")

    def cpu_s(self) -> float:
        """Seconds of processors that it has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def serving(seaweed: Seaweed, bucket: str, log: Path) -> Iterator[Server]:
    """`python -m services.api` over a bucket, ready."""
    port = free_port()
    settings = {
        "WA_STORE_URL": f"s3://{bucket}",
        "WA_S3_ENDPOINT": seaweed.endpoint_url,
        "WA_S3_ACCESS_KEY": seaweed.access_key,
        "WA_S3_SECRET_KEY": seaweed.secret_key,
        "WA_API_PORT": str(port),
        "WA_LOG_FORMAT": "json",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.api"], env=os.environ | settings, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        yield Server(url, process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/readyz", timeout=5).read()  # noqa: S310  an address of our own
            return
        time.sleep(0.1)
    raise RuntimeError("the API did not become ready")
