"""A small training loop that takes checkpoints in one of several ways; prints seconds of stretches.

Arguments: METHOD ENDPOINT KEY_ID SECRET BUCKET SECONDS THREADS. Every stretch with a checkpoint lies between two
of as many steps without; it has as many steps as its upload takes, found at first, so that what goes on in the
background is in it and little else. Of every stretch it says how long it took and for how much of that the
training thread ran.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.checkpoint_ways import METHODS, Bucket, Method

WIDTH, DEPTH, BATCH = 2048, 12, 16  # 50.4M parameters; short steps follow an upload more closely
MIN_STEPS, MAX_STEPS = 2, 60


class Training:
    """An MLP that learns to copy its input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)]
        self.model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.batch = torch.randn(BATCH, WIDTH)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> None:
        """Train. Gradients keep their memory: giving 200 MB back and taking them anew each time is noise."""
        loss = (self.model(self.batch) - self.batch).square().mean()
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()
        loss.item()

    def copy_s(self) -> float:
        """Seconds of one copy of the weights into memory that is there already."""
        tensors = [parameter.detach() for parameter in self.model.parameters()]
        targets = [torch.zeros_like(tensor) for tensor in tensors]
        found = []
        for _ in range(15):
            begin = time.perf_counter()
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor)
            found.append(time.perf_counter() - begin)
        return sorted(found)[7]


def measured(name: str, bucket: Bucket, *, seconds: float, threads: int) -> dict[str, Any]:
    """Train with and without, in turn, for as long as it says."""
    torch.set_num_threads(threads)
    training, method = Training(), METHODS[name](bucket)
    copy_s = training.copy_s()
    training.step()
    method.checkpoint(0, training.model)  # the first one starts processes and takes memory
    method.drain()
    num_steps = max(_num_steps(method, training, number) for number in (1, 2, 3))
    found: dict[str, Any] = {"with": [], "without": [_stretch(training, num_steps)], "call": [], "late": []}
    number, end = 3, time.perf_counter() + seconds
    while time.perf_counter() < end:
        number += 1
        begin, ran = time.perf_counter(), time.thread_time()
        method.checkpoint(number, training.model)
        call_s, call_ran_s = time.perf_counter() - begin, time.thread_time() - ran
        took_s, ran_s = _stretch(training, num_steps)
        begin = time.perf_counter()
        method.drain()
        found["late"].append(time.perf_counter() - begin)
        found["call"].append(call_s)
        found["with"].append((call_s + took_s, call_ran_s + ran_s))
        found["without"].append(_stretch(training, num_steps))
    return found | {"num_steps": num_steps, "num_parameters": training.num_parameters, "copy_s": copy_s}


def _stretch(training: Training, num_steps: int) -> tuple[float, float]:
    """Seconds of these steps, and for how many of them the thread ran."""
    begin, ran = time.perf_counter(), time.thread_time()
    for _ in range(num_steps):
        training.step()
    return time.perf_counter() - begin, time.thread_time() - ran


def _num_steps(method: Method, training: Training, number: int) -> int:
    """How many steps are done until a checkpoint is stored."""
    method.checkpoint(number, training.model)
    num_steps = 0
    while num_steps < MIN_STEPS or (num_steps < MAX_STEPS and not method.is_stored):
        training.step()
        num_steps += 1
    method.drain()
    return num_steps


def measured_in_ray(arguments: list[str], *, seconds: float, threads: int) -> dict[str, Any]:
    """The same in a worker of Ray Train, which keeps checkpoints in the bucket."""
    import pyarrow.fs
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    endpoint, access_key, secret_key, bucket = arguments
    store = pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint.removeprefix("http://"),
        scheme="http",
        access_key=access_key,
        secret_key=secret_key,
        region="us-east-1",
        allow_delayed_open=True,  # markers are then small requests, which are answered for real
    )
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"

        def train() -> None:
            found = measured("ray", Bucket(*arguments), seconds=seconds, threads=threads)
            output.write_text(json.dumps(found))

        ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
        TorchTrainer(
            train,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="ray", storage_path=f"{bucket}/ray", storage_filesystem=store),
        ).fit()
        return dict(json.loads(output.read_text()))


def main() -> None:
    """Measure one method, and print what was found."""
    name, *arguments, seconds, threads = sys.argv[1:]
    if name == "ray":
        found = measured_in_ray(arguments, seconds=float(seconds), threads=int(threads))
    else:
        found = measured(name, Bucket(*arguments), seconds=float(seconds), threads=int(threads))
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
