"""What tests of predictions share: runs without a trainer, the predictor as a process, a holder without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2

from services.recipes.loader import load_recipe
from support.averaging import averager, run_until_idle
from support.ports import free_port
from support.runs import DIGITS, HandmadeRun

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from wa_core.store.base import ObjectStore

TOKEN = "between-api-and-predictor"

#: A holder that takes any model; it says which model was asked, and for how many requests at once.
SCRIPTED_HOLDER = (
    sys.executable,
    "-c",
    """
import json, os, sys, time
loaded = []
for line in sys.stdin:
    command = json.loads(line)
    reply = {}
    if command["do"] == "load":
        loaded.append(command["key"])
    elif command["do"] == "drop":
        loaded.remove(command["key"])
    else:
        for instance in (instance for asked in command["requests"] for instance in asked):
            if instance == "die":
                os._exit(3)
            if instance == "shout":
                print("hello", flush=True)
            if str(instance).startswith("wait for "):
                while not os.path.exists(instance.removeprefix("wait for ")):
                    time.sleep(0.01)
        said = {"key": command["key"], "together": len(command["requests"]), "loaded": loaded, "pid": os.getpid()}
        reply["outcomes"] = [{"predictions": [said for _ in asked]} for asked in command["requests"]]
    print(json.dumps(reply), flush=True)
""",
)


class PublishedRun(HandmadeRun):
    """A run of digits, or of another recipe, whose averages a real averager folds and publishes."""

    def __init__(self, store: ObjectStore, *, recipe: str = DIGITS, **request: Any) -> None:
        super().__init__(store, averages={"swa": "swa"}, recipe=recipe, **request)

    def publish(self, step: int, weights: dict[str, Tensor]) -> None:
        """One more checkpoint, and the generation with it."""
        self.checkpoint(step, weights)
        run_until_idle(averager(self.store, assess_interval_s=0.0))

    @property
    def url(self) -> str:
        """Where it is asked."""
        return f"/v1/runs/{self.run_id}/averages/swa:predict"


def digits_weights(seed: int, *, width: int = 4) -> dict[str, Tensor]:
    """Some weights of the digits recipe's model."""
    import torch

    torch.manual_seed(seed)
    return load_recipe(DIGITS, {"width": width}, seed=0).build_model().state_dict()


@dataclass
class PredictorProcess:
    """`python -m services.predictor` on a bucket that is a folder."""

    bucket: Path
    log: Path
    environment: dict[str, str]
    port: int

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and return once it listens."""
        own = {
            "WA_STORE_URL": f"file://{self.bucket}",
            "WA_PREDICTOR_PORT": str(self.port),
            "WA_PREDICTOR_TOKEN": TOKEN,
            "WA_SCRATCH_DIR": str(self.log.parent / "scratch"),
        }
        with self.log.open("ab") as output:
            command = [sys.executable, "-m", "services.predictor"]
            environment = os.environ | own | self.environment
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx2.get(f"{self.url}/readyz", timeout=5).raise_for_status()
            except httpx2.TransportError:
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.process.kill()
        self.process.wait(30)


@contextmanager
def predicting(bucket: Path, log: Path, **environment: str) -> Iterator[PredictorProcess]:
    """A predictor, started, and killed at the end."""
    predictor = PredictorProcess(bucket, log, environment, free_port())
    predictor.start()
    try:
        yield predictor
    finally:
        predictor.kill()
