"""A small training loop that takes checkpoints in one of several ways; prints seconds of steps with and without.

Arguments: METHOD ENDPOINT KEY_ID SECRET BUCKET STEPS ROUNDS THREADS. A round is STEPS steps after one checkpoint,
with whatever goes on in the background, and as many without; the upload is over before the next stretch begins.
Of every step it says how long it took and for how much of that the training thread ran.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import boto3
import torch
from botocore.config import Config
from torch import distributed, nn
from torch.distributed import checkpoint as dcp

from wa_core.averaging.rules import SwaRule  # noqa: F401  what a trainer with this project has loaded
from wa_core.catalog.runs import RunLog, submit
from wa_core.clock import SystemClock
from wa_core.publisher import CheckpointPublisher
from wa_core.records import AttemptStarted, RunRequest
from wa_core.store.s3 import S3Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WIDTH, DEPTH, BATCH = 2048, 12, 64  # 50.4M parameters


class Method(Protocol):
    """A way of taking checkpoints."""

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Take one; may return before it is stored."""
        ...

    def drain(self) -> None:
        """Wait until everything is stored."""
        ...


class Nothing:
    """No checkpoints: what a round costs by itself."""

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Take none."""

    def drain(self) -> None:
        """Nothing is under way."""


class Copy:
    """One copy into memory that is kept, and nothing else: what no method can do without."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def checkpoint(self, step: int, model: nn.Module) -> None:  # noqa: ARG002  a copy has no name
        """Copy."""
        state = model.state_dict()
        self._kept = self._kept or {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for name, tensor in state.items():
            self._kept[name].copy_(tensor)

    def drain(self) -> None:
        """Nothing is under way."""


class Blocking:
    """`torch.save`, then boto3, in the training loop."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Save and upload."""
        self._bucket.save(step, model.state_dict())

    def drain(self) -> None:
        """Nothing is under way."""


class InThread:
    """A copy, then `torch.save` and boto3 in a thread."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._thread: threading.Thread | None = None

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Copy, and leave the rest to a thread."""
        self.drain()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._thread = threading.Thread(target=self._bucket.save, args=(step, state))
        self._thread.start()

    def drain(self) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join()


class Dcp:
    """`torch.distributed.checkpoint.async_save` to a folder in memory, uploaded by a thread when it is there."""

    def __init__(self, bucket: Bucket, kind: str) -> None:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self._bucket = bucket
        self._temporary = tempfile.TemporaryDirectory(dir="/dev/shm")  # memory, as kind as can be
        self._folder = Path(self._temporary.name)
        self._type = AsyncCheckpointerType(kind)
        self._stager: Any = None
        self._thread: threading.Thread | None = None
        store = distributed.HashStore()
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Stage, and leave the rest to the background."""
        self.drain()
        folder = self._folder / str(step)
        future = dcp.async_save(
            {"model": model.state_dict()}, checkpoint_id=folder, async_checkpointer_type=self._type
        )
        self._thread = threading.Thread(target=self._upload, args=(step, future, folder))
        self._thread.start()

    def drain(self) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join()

    def _upload(self, step: int, future: Any, folder: Path) -> None:  # noqa: ANN401  a future, or two in one
        getattr(future, "upload_completion", future).result()
        for path in folder.iterdir():
            self._bucket.upload(f"{step}/{path.name}", path)
            path.unlink()


class Published:
    """`CheckpointPublisher`."""

    def __init__(self, bucket: Bucket) -> None:
        clock = SystemClock()
        self._store = bucket.store
        run_id = submit(self._store, RunRequest(recipe="benchmarks.none:None_"), clock=clock).run_id
        self._log = RunLog(self._store, run_id, clock=clock)
        self._log.append(AttemptStarted(runner_id="benchmark"))
        self._num_committed = 0
        self._publisher = CheckpointPublisher(self._store, run_id, attempt=1)

    def checkpoint(self, step: int, model: nn.Module) -> None:
        """Offer it."""
        self._publisher.offer(step, model)
        self._num_committed += 1

    def drain(self) -> None:
        """Wait until it is committed."""
        while len(self._log.lineage) < self._num_committed:
            time.sleep(0.05)
            self._log.refresh()


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
    "publisher": Published,
}


class Training:
    """An MLP that learns to copy its input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
        self.model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.batch = torch.randn(BATCH, WIDTH)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def steps(self, num_steps: int) -> list[tuple[float, float]]:
        """Train; of each step the seconds that passed, and those in which the thread ran."""
        found = []
        for _ in range(num_steps):
            begin, ran = time.perf_counter(), time.thread_time()
            loss = (self.model(self.batch) - self.batch).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
            found.append((time.perf_counter() - begin, time.thread_time() - ran))
        return found

    def copy_s(self) -> float:
        """Seconds of one copy of the weights into memory that is there already."""
        tensors = [parameter.detach() for parameter in self.model.parameters()]
        targets = [torch.zeros_like(tensor) for tensor in tensors]
        found = []
        for _ in range(7):
            begin = time.perf_counter()
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor)
            found.append(time.perf_counter() - begin)
        return sorted(found)[3]


def main() -> None:
    """Train with and without, in turn, and print what it took."""
    name, endpoint, access_key, secret_key, bucket, *numbers = sys.argv[1:]
    num_steps, rounds, threads = map(int, numbers)
    torch.set_num_threads(threads)
    training = Training()
    method = METHODS[name](Bucket(endpoint, access_key, secret_key, bucket))
    found: dict[str, Any] = {"with": [], "without": [], "call": [], "stored": []}
    training.steps(3)
    method.checkpoint(0, training.model)  # the first one starts processes and takes memory
    method.drain()
    for number in range(1, rounds + 1):
        for kind in ("with", "without") if number % 2 else ("without", "with"):
            begin = time.perf_counter()
            if kind == "with":
                method.checkpoint(number, training.model)
                found["call"].append(time.perf_counter() - begin)
            found[kind].append(training.steps(num_steps))
            trained_s = time.perf_counter() - begin
            method.drain()
            if kind == "with":
                found["stored"].append(time.perf_counter() - begin)
            print(f"{name} {kind}: {trained_s:.3f} s, {time.perf_counter() - begin:.3f} s", file=sys.stderr)
    print(json.dumps(found | {"num_parameters": training.num_parameters, "copy_s": training.copy_s()}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
