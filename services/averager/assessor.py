"""The averager's side of assessing: keeps one child process, gives it jobs, and survives what it does.

The child starts with the first job (importing torch and a recipe costs seconds) and serves many. It is killed and
started anew when it dies, hangs past the time limit or talks nonsense; the outcome then says so.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from pydantic import TypeAdapter, ValidationError

from wa_core.errors import CorruptError, TransientError, UserCodeError
from wa_core.records import BatchNormSummary
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from wa_core.records import RunRequest

TIME_LIMIT_S = 300.0
_metrics: TypeAdapter[dict[str, float] | None] = TypeAdapter(dict[str, float] | None)
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What assessing found out about one average.

    `raw`, `before` and `after` are held-out metrics by name, None where it could not be measured. `buffers` are
    the recalibrated BatchNorm buffers by canonical name, empty when there are none.
    """

    batchnorm: BatchNormSummary
    raw: dict[str, float] | None = None
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    took_s: float = 0.0


class Assessor(Protocol):
    """Recalibrates and measures averages of one run."""

    def assess(
        self, request: RunRequest, *, raw: Mapping[str, Tensor] | None, weights: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Outcome]:
        """Assess every average in `weights`, by name; trouble is an outcome, never an exception."""
        ...


class ProcessAssessor:
    """Assesses in a child process. A context manager: leaving it ends the child.

    Args:
        time_limit_s: after so long a job's child is killed.
        should_stop: asked while waiting; when true, the wait is given up with `TransientError`.
    """

    def __init__(
        self, *, time_limit_s: float = TIME_LIMIT_S, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._time_limit_s = time_limit_s
        self._should_stop = should_stop
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def assess(
        self, request: RunRequest, *, raw: Mapping[str, Tensor] | None, weights: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Outcome]:
        """Assess every average in `weights`, by name.

        Raises:
            TransientError: the process was asked to stop meanwhile.
        """
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="wa-assess-") as name:
            folder = Path(name)
            try:
                answer = self._ask(_write_job(folder, request, raw=raw, weights=weights))
                took_s = time.monotonic() - started
                return {average: _outcome(folder, answer, average, took_s=took_s) for average in weights}
            except UserCodeError as error:
                failed = BatchNormSummary(status="failed", code="assess_failed", message=error.message)
                return {average: Outcome(failed, took_s=time.monotonic() - started) for average in weights}

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        child = self._running_child()
        assert child.stdin is not None  # noqa: S101  it was started with a pipe
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()
            answer = json.loads(self._answer_of(child))
        except (OSError, ValueError) as error:
            self.close()
            raise UserCodeError(f"the assess process died or talked nonsense ({error})") from None
        if "error" in answer:
            raise UserCodeError(str(answer["error"])[:2000])
        return dict(answer)

    def _answer_of(self, child: subprocess.Popen[bytes]) -> bytes:
        """The child's one line of answer, waited for under the time limit."""
        assert child.stdout is not None  # noqa: S101  it was started with a pipe
        deadline = time.monotonic() + self._time_limit_s
        while not select.select([child.stdout], [], [], _POLL_S)[0]:
            if self._should_stop():
                self.close()
                raise TransientError("assessing was given up because the process is stopping")
            if time.monotonic() > deadline:
                self.close()
                raise UserCodeError(f"assessing took longer than {self._time_limit_s:g} s and was killed")
        return child.stdout.readline()

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "services.averager.assess"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment_without_secrets(),
            )
        return self._child


def environment_without_secrets() -> dict[str, str]:
    """This process's environment for user code: no credentials of ours in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("WA_", "AWS_", "RAY_AUTH"))}


def _write_job(
    folder: Path,
    request: RunRequest,
    *,
    raw: Mapping[str, Tensor] | None,
    weights: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Put the tensors into `folder`; returns the job that names them."""
    files = {average: f"average-{number}.safetensors" for number, average in enumerate(weights)}
    for average, file in files.items():
        (folder / file).write_bytes(serialize(dict(weights[average]), restore_ties=True))
    if raw is not None:
        (folder / "raw.safetensors").write_bytes(serialize(dict(raw), restore_ties=True))
    return {
        "folder": str(folder),
        "recipe": request.recipe,
        "config": request.config,
        "seed": request.seed,
        "raw": None if raw is None else "raw.safetensors",
        "averages": files,
    }


def _outcome(folder: Path, answer: dict[str, Any], average: str, *, took_s: float) -> Outcome:
    """The child's answer on one average, believed only as far as it has the right form.

    Raises:
        UserCodeError: it has not.
    """
    try:
        found = answer["averages"][average]
        file = found["buffers"]
        return Outcome(
            batchnorm=BatchNormSummary.model_validate(found["batchnorm"]),
            raw=_metrics.validate_python(answer["raw"]),
            before=_metrics.validate_python(found["before"]),
            after=_metrics.validate_python(found["after"]),
            buffers=read_checkpoint([(folder / file).read_bytes()]).tensors if file else {},
            took_s=took_s,
        )
    except (KeyError, TypeError, OSError, ValidationError, CorruptError) as error:
        raise UserCodeError(f"the assess process talked nonsense of {average!r} ({error})") from None
