"""One real SeaweedFS on free loopback ports, for tests."""

from __future__ import annotations

import itertools
import os
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from services.stack import seaweedfs
from services.stack.seaweedfs import SeaweedConfig
from wa_core.store.s3 import MULTIPART_BYTES, S3Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"


@dataclass
class Seaweed:
    """A running server. `process` can be killed and `start` called again: the data stays."""

    config: SeaweedConfig
    process: subprocess.Popen[bytes] | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def endpoint_url(self) -> str:
        """Where S3 answers."""
        return self.config.endpoint_url

    @property
    def access_key(self) -> str:
        """The key's id."""
        return self.config.access_key

    @property
    def secret_key(self) -> str:
        """The key."""
        return self.config.secret_key

    def new_store(self) -> S3Store:
        """A store on a fresh bucket of its own."""
        store = seaweedfs.open_store(replace(self.config, bucket=f"test-{next(self._numbers)}"))
        store.ensure_bucket()
        return store

    def store_at(
        self, endpoint_url: str, *, bucket: str, secret_key: str = "", multipart_bytes: int = MULTIPART_BYTES
    ) -> S3Store:
        """An existing bucket, reached some other way (such as through a proxy), or with another secret."""
        return S3Store(
            bucket=bucket,
            endpoint_url=endpoint_url,
            access_key=self.access_key,
            secret_key=secret_key or self.secret_key,
            multipart_bytes=multipart_bytes,
        )

    def start(self) -> None:
        """Start the server and wait until it takes writes."""
        self.config.data_dir.mkdir(parents=True, exist_ok=True)
        with (self.config.data_dir.parent / "weed.log").open("ab") as output:
            self.process = process = subprocess.Popen(
                seaweedfs.argv(self.config),
                env=os.environ | seaweedfs.environment(self.config),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        seaweedfs.wait_until_ready(self.config, timeout_s=60, is_alive=lambda: process.poll() is None)

    def kill(self) -> None:
        """End the server with SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running_seaweed(folder: Path) -> Iterator[Seaweed]:
    """A server whose data is in `folder`, ended by pid on the way out."""
    config = SeaweedConfig(
        data_dir=folder / "data",
        ports=seaweedfs.free_ports(seaweedfs.NUM_PORTS),
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
    )
    server = Seaweed(config)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        seaweedfs.remove_sockets(config)
