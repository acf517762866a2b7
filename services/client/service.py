"""The service as a Python object, for programs that wait: one method for each thing that the REST API does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

from services.client import calls, scripts
from services.client.connected import Connected
from services.client.download import fetch_file
from services.client.facade import plays, sends
from services.client.scripts import POLL_S, Found, Rest
from services.client.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from services.client.answers import Checkpoint, Run
    from services.client.calls import Call
    from services.client.scripts import Script

T = TypeVar("T")


class Client(Connected):
    """A connection to one service; a context manager. One client per thread.

    Args:
        base_url: where the service is; None for ``http://127.0.0.1:8000``.
        token: the bearer token, if the service wants one.
        timeout_s: how long one answer may take to begin.
        patience_s: for how long reading is tried again while the service or its store is away.

    Every method raises `ServiceUnreachableError` when there is no service, and `ApiError` when it refuses. What
    comes back are frozen objects of `services.client.answers`.
    """

    _transport_kind = Transport
    _transport: Transport

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the connections."""
        self._transport.close()

    def send(self, call: Call[T]) -> T:
        """Send any call of `services.client.calls`, and return its result."""
        return self._transport.send(call)

    def play(self, script: Script[T]) -> Iterator[T]:
        """Do what a script of `services.client.scripts` wants, and yield what it finds."""
        said: Any = None
        while True:
            try:
                step = script.send(said)
            except StopIteration:
                return
            said = None
            if isinstance(step, Found):
                yield step.value
            elif isinstance(step, Rest):
                time.sleep(step.seconds)
            else:
                said = self.send(step)

    version = sends(calls.version)
    ready = sends(calls.ready)

    submit = sends(calls.submit)
    upload_package = sends(calls.upload_package)
    runs = sends(calls.runs)
    run = sends(calls.run)
    cancel = sends(calls.cancel)
    pause = sends(calls.pause)
    resume = sends(calls.resume)
    all_runs = plays(scripts.all_runs)
    watch = plays(scripts.watch)

    events = sends(calls.events)
    logs = sends(calls.logs)
    metrics = sends(calls.metrics)
    all_events = plays(scripts.all_events)
    all_logs = plays(scripts.all_logs)
    all_metrics = plays(scripts.all_metrics)
    all_deliveries = plays(scripts.all_deliveries)
    follow_events = plays(scripts.follow_events)
    follow_logs = plays(scripts.follow_logs)
    follow_metrics = plays(scripts.follow_metrics)

    all_checkpoints = plays(scripts.all_checkpoints)
    averages = sends(calls.averages)
    average = sends(calls.average)
    add_average = sends(calls.add_average)
    preview_average = sends(calls.preview_average)
    generations = sends(calls.generations)
    all_generations = plays(scripts.all_generations)
    landscapes = sends(calls.landscapes)
    landscape = sends(calls.landscape)
    start_landscape = sends(calls.start_landscape)
    start_verification = sends(calls.start_verification)
    verifications = sends(calls.verifications)
    verification = sends(calls.verification)
    predict = sends(calls.predict)
    model_card = sends(calls.model_card)
    model_config = sends(calls.model_config)
    coefficients = sends(calls.coefficients)
    provenance = sends(calls.provenance)

    tokens = sends(calls.tokens)
    create_token = sends(calls.create_token)
    revoke_token = sends(calls.revoke_token)

    def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """All committed checkpoints in order; `is_abandoned` marks those that no average counts."""
        return list(self.all_checkpoints(run_id))

    def wait(self, run_id: str, *, on_update: Callable[[Run], None] | None = None, poll_s: float = POLL_S) -> Run:
        """Wait until a run has ended, and return it; `on_update` is told of every change."""
        for run in self.watch(run_id, poll_s=poll_s):
            if on_update is not None:
                on_update(run)
        return run

    def download(
        self,
        run_id: str,
        name: str,
        path: str | Path,
        *,
        file: str = "weights.safetensors",
        at: str | int | None = None,
        generation: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Download averaged weights to `path`, going on with a partial download and checking the digest.

        Args:
            run_id: the run.
            name: the average.
            path: the file to write; it appears whole or not at all (``PATH.part`` until then).
            file: ``weights.safetensors`` or ``weights.pt``.
            at: ``"latest"`` (also None), ``"best"``, or the step of the last checkpoint in it.
            generation: the generation, instead of `at`.
            on_progress: told (bytes so far, bytes in all) after each piece.

        Raises:
            CorruptError: what arrived is not what the service promised, twice.
            InvalidInputError: `path` cannot be written.
        """
        wanted, query = calls.file_of(run_id, name, file=file, at=at, generation=generation)
        return fetch_file(self._transport, wanted, path, query=query, on_progress=on_progress)

    def download_raw(
        self,
        run_id: str,
        path: str | Path,
        *,
        step: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Download a checkpoint's raw weights, which averages are compared with, as `download` does.

        Args:
            run_id: the run.
            path: the file to write.
            step: the checkpoint's; None is the newest.
            on_progress: told (bytes so far, bytes in all) after each piece.

        Raises:
            CorruptError: what arrived is not what the service promised, twice.
            InvalidInputError: `path` cannot be written.
        """
        wanted = calls.raw_file_of(run_id, step=step)
        return fetch_file(self._transport, wanted, path, on_progress=on_progress)
