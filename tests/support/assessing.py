"""What tests of assessing share: a small recipe that behaves, or not, as its config says, and jobs for it.

`CHILD` is the command of the assess process with this recipe in place of the built-in ones.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from services.averager import assess
from services.averager.assess_job import AssessJob
from support.child import serving
from support.patience import eventually
from support.untrained import Untrained
from wa_core.records import AverageManifest, RecipeConfig, RunRequest
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.averager.assess_job import FinishedJob
    from services.averager.assessor import Assessor

CHILD = serving("support.assessing")
NUM_HELDOUT = 24


class TinyConfig(RecipeConfig):
    """How the recipe behaves, and where it leaves its marks."""

    mood: str = "fine"
    marks: str = ""
    average: float = 1.0  # the mood is only for weights whose scale is this


class Tiny(Untrained):
    """A scale, a BatchNorm and fixed data; the loss of a sample is the mean square of its outputs."""

    Config = TinyConfig
    config: TinyConfig

    def build_model(self) -> nn.Module:
        """Nothing random."""
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        nn.init.eye_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        return model

    def forward(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        result: torch.Tensor = model(batch)
        return result

    def calibration_batches(self) -> list[torch.Tensor]:
        """Two batches of a distribution of its own."""
        return list((3 + 2 * _data(64)).split(32))

    def heldout_batches(self) -> list[torch.Tensor]:
        """Batches of 10, 10 and 4 samples."""
        return list(_data(NUM_HELDOUT).split(10))

    def evaluate(self, model: nn.Module, batches: Any) -> dict[str, float]:
        """Behave, and measure."""
        return {name: float(values.mean()) for name, values in self.evaluate_each(model, batches).items()}

    def evaluate_each(self, model: nn.Module, batches: Any) -> dict[str, torch.Tensor]:
        """Behave, and measure each sample."""
        if float(model.state_dict()["0.weight"][0, 0]) == self.config.average:
            self._behave()
        if self.config.marks:
            with Path(self.config.marks).open("a") as marks:
                marks.write("evaluated\n")
        model.eval()
        with torch.no_grad():
            return {"loss": torch.cat([model(batch).double().square().mean(dim=1) for batch in batches])}

    def _behave(self) -> None:
        moods = {"hang": _hang, "raise": _raise, "exit": sys.exit, "eat": _eat, "shout": _shout, "flood": _flood}
        if self.config.mood == "spawn":
            self._mark(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)
            _hang()
        elif mood := moods.get(self.config.mood):
            self._mark(os.getpid())
            mood()

    def _mark(self, pid: int) -> None:
        part = Path(f"{self.config.marks}.part")
        part.write_text(str(pid))
        part.rename(f"{self.config.marks}.pid")


def serve() -> int:
    """The assess process."""
    return assess.main(lambda _, config, *, seed, **_others: Tiny(TinyConfig.model_validate(config), seed=seed))


def tiny_weights(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights of the recipe's model whose first layer multiplies by `scale`."""
    weights = Tiny(TinyConfig()).build_model().state_dict()
    return weights | {"0.weight": scale * weights["0.weight"]}


def tiny_request(**config: object) -> RunRequest:
    """A request for the recipe."""
    return RunRequest.model_validate({"recipe": "support.assessing:Tiny", "config": config})


def make_job(
    folder: Path,
    averages: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    raw: Mapping[str, torch.Tensor] | None = None,
    request: RunRequest | None = None,
    generation: int = 1,
) -> AssessJob:
    """A job in a fresh folder inside `folder`."""
    place = Path(tempfile.mkdtemp(prefix="job-", dir=folder))
    job = AssessJob(
        run_id="01J0000000000000000000000A",
        request=request or tiny_request(),
        folder=place,
        raw_step=None if raw is None else 20,
        averages={name: manifest(name, generation=generation) for name in averages},
        checkpoints={20: "ab" * 32},
    )
    if raw is not None:
        job.raw_path.write_bytes(serialize(raw))
    for name, weights in averages.items():
        job.value_path(name).write_bytes(serialize(weights, metadata={"generation": str(generation)}))
    return job


def manifest(name: str, *, generation: int = 1) -> AverageManifest:
    """A generation of two checkpoints."""
    return AverageManifest(
        run_id="01J0000000000000000000000A",
        name=name,
        generation=generation,
        at=datetime(2026, 1, 1, tzinfo=UTC),
        rule="swa",
        accumulator_dtype="float64",
        cursor=4,
        folded=[3, 4],
        coefficients={10: 0.5, 20: 0.5},
    )


def finish(assessor: Assessor) -> FinishedJob:
    """Ask until the job has ended."""
    finished = eventually(assessor.poll, timeout_s=120, what="the end of the job")
    assert finished is not None
    return finished


def wait_for(path: Path) -> int:
    """The process id that the recipe's mark holds, once it is there."""
    eventually(path.exists, timeout_s=120, what=f"the appearance of {path}")
    return int(path.read_text())


def _data(count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(count))


def _hang() -> None:
    threading.Event().wait()


def _raise() -> None:
    raise RuntimeError("no such metric")


def _eat() -> None:
    eaten = [bytearray(b"x") * (32 << 20) for _ in range(24)]
    threading.Event().wait(len(eaten) * 600)


def _shout() -> None:
    """Write to whatever pipe leads out, as C code may."""
    _write_to_pipes(b"look at me\n")


def _flood() -> None:
    _write_to_pipes(b"x" * (20 << 20))


def _write_to_pipes(text: bytes) -> None:
    for fd in range(3, 64):
        try:
            is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        except OSError:
            continue
        if is_pipe:
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(fd, rest) :]
