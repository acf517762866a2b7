"""The ways of taking checkpoints that are measured side by side; all of them store to one bucket.

What is usual is written as its own manual shows it. A way knows nothing of how it is measured.
"""

from __future__ import annotations

import io
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import boto3
import torch
from botocore.config import Config
from torch import distributed
from torch.distributed import checkpoint as dcp

from wa_core.averaging.rules import SwaRule  # noqa: F401  what a trainer with this project has loaded
from wa_core.catalog.runs import RunLog, submit
from wa_core.clock import SystemClock
from wa_core.publisher import CheckpointPublisher
from wa_core.records import AttemptStarted, RunRequest
from wa_core.store.s3 import S3Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn


class Method(Protocol):
    """A way of taking checkpoints."""

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Take one; may return before it is stored."""
        ...

    @property
    def is_stored(self) -> bool:
        """Whether everything is stored."""
        ...

    def drain(self) -> None:
        """Wait until everything is stored."""
        ...


class AtOnce:
    """A way that leaves nothing to the background."""

    is_stored = True

    def drain(self) -> None:
        """Nothing is under way."""


class InBackground:
    """A way that leaves the rest to a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the thread is done."""
        return self._thread is None or not self._thread.is_alive()

    def drain(self) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join()

    def leave(self, work: Callable[..., None], *arguments: object) -> None:
        """Do the rest there."""
        self._thread = threading.Thread(target=work, args=arguments)
        self._thread.start()


class Nothing(AtOnce):
    """No checkpoints: what a round costs by itself."""

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Take none."""


class Copy(AtOnce):
    """One copy into memory that is kept, and nothing else: what no method can do without."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def checkpoint(self, step: int, model: nn.Module) -> None:  # noqa: ARG002  a copy has no name
        """Copy."""
        state = model.state_dict()
        self._kept = self._kept or {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for name, tensor in state.items():
            self._kept[name].copy_(tensor)


class Blocking(AtOnce):
    """`torch.save`, then boto3, in the training loop."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Save and upload."""
        self._bucket.save(step, model.state_dict())


class InThread(InBackground):
    """A copy, then `torch.save` and boto3 in a thread."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__()
        self._bucket = bucket

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Copy, and leave the rest to a thread."""
        self.drain()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.leave(self._bucket.save, step, state)


class Dcp(InBackground):
    """`torch.distributed.checkpoint.async_save` to a folder in memory, uploaded by a thread when it is there."""

    def __init__(self, bucket: Bucket, kind: str) -> None:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        super().__init__()
        self._bucket = bucket
        self._temporary = tempfile.TemporaryDirectory(dir="/dev/shm")  # memory, as kind as can be
        self._folder = Path(self._temporary.name)
        self._type = AsyncCheckpointerType(kind)
        self._stager: Any = None
        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Stage, and leave the rest to the background."""
        self.drain()
        folder = self._folder / str(step)
        future = dcp.async_save(
            {"model": model.state_dict()}, checkpoint_id=folder, async_checkpointer_type=self._type
        )
        self.leave(self._upload, step, future, folder)

    def _upload(self, step: int, future: Any, folder: Path) -> None:  # noqa: ANN401  a future, or two in one
        getattr(future, "upload_completion", future).result()
        for path in folder.iterdir():
            self._bucket.upload(f"{step}/{path.name}", path)
            path.unlink()


class RayReport(AtOnce):
    """`ray.train.report(checkpoint=...)` as its manual shows it, in a worker of Ray Train."""

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Save to a folder in memory, and report that."""
        import ray.train

        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            torch.save(model.state_dict(), Path(folder) / "model.pt")
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


class Published:
    """`CheckpointPublisher`."""

    def __init__(self, bucket: Bucket) -> None:
        clock = SystemClock()
        run_id = submit(bucket.store, RunRequest(recipe="benchmarks.none:None_"), clock=clock).run_id
        RunLog(bucket.store, run_id, clock=clock).append(AttemptStarted(runner_id="benchmark"))
        self._stored = threading.Event()
        self._publisher = CheckpointPublisher(bucket.store, run_id, attempt=1, around_upload=self._noted)

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Offer it."""
        self._stored.clear()
        self._publisher.offer(step, model)

    @property
    def is_stored(self) -> bool:
        """Whether it is committed; if it could not be, the next offer raises."""
        return self._stored.is_set()

    def drain(self) -> None:
        """Wait until it is committed."""
        self._stored.wait()

    @contextmanager
    def _noted(self, step: int) -> Iterator[None]:  # noqa: ARG002  there is one at a time
        try:
            yield
        finally:
            self._stored.set()


class Bucket:
    """The bucket, as the usual script and as this project uses it."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str, bucket: str) -> None:
        self.store = S3Store(bucket=bucket, endpoint_url=endpoint, access_key=access_key, secret_key=secret_key)
        self._bucket = bucket
        self._client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """`torch.save` and upload."""
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        self._client.upload_fileobj(file, self._bucket, f"{step}.pt")

    def upload(self, key: str, path: Path) -> None:
        """Upload a file."""
        self._client.upload_file(str(path), self._bucket, key)


METHODS: dict[str, Callable[[Bucket], Method]] = {
    "none": lambda _: Nothing(),
    "copy": lambda _: Copy(),
    "blocking": Blocking,
    "thread": InThread,
    "dcp": lambda bucket: Dcp(bucket, "thread"),
    "dcp-process": lambda bucket: Dcp(bucket, "process"),
    "ray": lambda _: RayReport(),
    "publisher": Published,
}
