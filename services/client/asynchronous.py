"""The service as a Python object, for programs that await: `Client`, method for method.

Calls and scripts are the same objects; what differs is who waits.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar

from services.client import calls, scripts
from services.client.connected import Connected
from services.client.download import fetch_file_async
from services.client.facade import aplays, asends
from services.client.scripts import POLL_S, Found, Rest
from services.client.transport import AsyncTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path
    from types import TracebackType

    from services.client.answers import Checkpoint, Run
    from services.client.calls import Call
    from services.client.scripts import Script

T = TypeVar("T")


class AsyncClient(Connected):
    """A connection to one service; an asynchronous context manager.

    Arguments, methods, results and errors are those of `Client`.
    """

    _transport_kind = AsyncTransport
    _transport: AsyncTransport

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give back the connections."""
        await self._transport.close()

    async def send(self, call: Call[T]) -> T:
        """Send any call of `services.client.calls`, and return its result."""
        return await self._transport.send(call)

    async def play(self, script: Script[T]) -> AsyncIterator[T]:
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
                await asyncio.sleep(step.seconds)
            else:
                said = await self.send(step)

    version = asends(calls.version)
    ready = asends(calls.ready)

    submit = asends(calls.submit)
    upload_package = asends(calls.upload_package)
    runs = asends(calls.runs)
    run = asends(calls.run)
    cancel = asends(calls.cancel)
    pause = asends(calls.pause)
    resume = asends(calls.resume)
    all_runs = aplays(scripts.all_runs)
    watch = aplays(scripts.watch)

    events = asends(calls.events)
    logs = asends(calls.logs)
    metrics = asends(calls.metrics)
    all_events = aplays(scripts.all_events)
    all_logs = aplays(scripts.all_logs)
    all_metrics = aplays(scripts.all_metrics)
    all_deliveries = aplays(scripts.all_deliveries)
    follow_events = aplays(scripts.follow_events)
    follow_logs = aplays(scripts.follow_logs)
    follow_metrics = aplays(scripts.follow_metrics)

    all_checkpoints = aplays(scripts.all_checkpoints)
    averages = asends(calls.averages)
    average = asends(calls.average)
    add_average = asends(calls.add_average)
    preview_average = asends(calls.preview_average)
    generations = asends(calls.generations)
    all_generations = aplays(scripts.all_generations)
    landscapes = asends(calls.landscapes)
    landscape = asends(calls.landscape)
    start_landscape = asends(calls.start_landscape)
    start_verification = asends(calls.start_verification)
    verifications = asends(calls.verifications)
    verification = asends(calls.verification)
    predict = asends(calls.predict)
    model_card = asends(calls.model_card)
    model_config = asends(calls.model_config)
    coefficients = asends(calls.coefficients)
    provenance = asends(calls.provenance)

    tokens = asends(calls.tokens)
    create_token = asends(calls.create_token)
    revoke_token = asends(calls.revoke_token)

    async def checkpoints(self, run_id: str) -> list[Checkpoint]:
        """All committed checkpoints in order; `is_abandoned` marks those that no average counts."""
        return [checkpoint async for checkpoint in self.all_checkpoints(run_id)]

    async def wait(
        self, run_id: str, *, on_update: Callable[[Run], None] | None = None, poll_s: float = POLL_S
    ) -> Run:
        """Wait until a run has ended, and return it; `on_update` is told of every change."""
        async for run in self.watch(run_id, poll_s=poll_s):
            if on_update is not None:
                on_update(run)
        return run

    async def download(
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
        """Download averaged weights to `path`; see `Client.download`."""
        wanted, query = calls.file_of(run_id, name, file=file, at=at, generation=generation)
        return await fetch_file_async(self._transport, wanted, path, query=query, on_progress=on_progress)

    async def download_raw(
        self,
        run_id: str,
        path: str | Path,
        *,
        step: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Download a checkpoint's raw weights to `path`; see `Client.download_raw`."""
        wanted = calls.raw_file_of(run_id, step=step)
        return await fetch_file_async(self._transport, wanted, path, on_progress=on_progress)
