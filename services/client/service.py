"""The service as a Python object: one method for each thing that the REST API does.

Answers are the API's JSON as dictionaries, so that a newer service may say more than this client knows.
"""

from __future__ import annotations

import os
import time
import uuid
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from services.client.download import fetch_file
from services.client.transport import Query, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

DEFAULT_URL = "http://127.0.0.1:8000"
TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})

Json = dict[str, Any]


class Client:
    """A connection to one service; a context manager. One client per thread.

    Args:
        base_url: where the service is; None for ``http://127.0.0.1:8000``.
        token: the bearer token, if the service wants one.
        timeout_s: how long one answer may take to begin.
        patience_s: for how long reading is tried again while the service or its store is away.

    Every method raises `ServiceUnreachableError` when there is no service, and `ApiError` when it refuses.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        patience_s: float = 10.0,
    ) -> None:
        self._transport = Transport(
            base_url or DEFAULT_URL, token=token, timeout_s=timeout_s, patience_s=patience_s
        )

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, *, timeout_s: float = 30.0, patience_s: float = 10.0
    ) -> Client:
        """A client for ``WA_API_URL`` with ``WA_TOKEN``."""
        variables = os.environ if environ is None else environ
        return cls(
            variables.get("WA_API_URL") or None,
            token=variables.get("WA_TOKEN") or None,
            timeout_s=timeout_s,
            patience_s=patience_s,
        )

    @property
    def base_url(self) -> str:
        """Where the service is."""
        return self._transport.base_url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the connections."""
        self._transport.close()

    # -- the service ----------------------------------------------------------------------------------------

    def version(self) -> Json:
        """``{"version", "format"}`` of the service."""
        return self._object("/version")

    def ready(self) -> Json:
        """``{"status", "checks"}`` of a service that is ready; `ApiError` 503 of one that is not."""
        return self._object("/readyz")

    # -- runs -----------------------------------------------------------------------------------------------

    def submit(self, request: Json, *, key: str | None = None) -> Json:
        """Submit a run, and return it.

        It is sent with an Idempotency-Key, `key` or a new one, and again while the service is away: that makes one
        run, however often it arrives.
        """
        return dict(self._transport.post("/v1/runs", body=request, key=key or uuid.uuid4().hex))

    def upload_package(self, body: bytes) -> Json:
        """Upload a zip of Python code; its ``package`` is what a submission names."""
        return dict(self._transport.upload("/v1/packages", body=body, content_type="application/zip"))

    def runs(
        self,
        *,
        state: str | None = None,
        label: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Json:
        """One page of runs, newest first: ``{"data", "has_more", "next"}``; `label` is ``key:value``."""
        return self._object("/v1/runs", state=state, label=label, limit=limit, after=after)

    def run(self, run_id: str, *, wait_s: float | None = None) -> Json:
        """One run; with `wait_s`, as soon as something about it changes or after that many seconds."""
        return dict(self._transport.get(_run(run_id), query={"wait": wait_s}, extra_s=wait_s or 0.0))

    def cancel(self, run_id: str) -> Json:
        """Ask for a run's end, and return the run."""
        return dict(self._transport.post(f"{_run(run_id)}:cancel"))

    def pause(self, run_id: str) -> Json:
        """Ask a run to pause after a last checkpoint, and return the run."""
        return dict(self._transport.post(f"{_run(run_id)}:pause"))

    def resume(
        self,
        run_id: str,
        *,
        from_step: int | None = None,
        lr_scale: float | None = None,
        skip_batches: int | None = None,
    ) -> Json:
        """Let a paused run go on, or let one go back to the newest kept checkpoint at or before `from_step`.

        From there on learning rates are multiplied by `lr_scale`, and the next `skip_batches` batches left out.
        `ApiError` with the code ``step_not_kept`` names the steps that are.
        """
        changes = {"from_step": from_step, "lr_scale": lr_scale, "skip_batches": skip_batches}
        body = {name: value for name, value in changes.items() if value is not None}
        return dict(self._transport.post(f"{_run(run_id)}:resume", body=body or None))

    def watch(self, run_id: str, *, poll_s: float = 0.5) -> Iterator[Json]:
        """Yield the run now and after every change, until it has ended."""
        last = None
        while True:
            run = self.run(run_id)
            if run != last:
                yield run
            if run["state"] in TERMINAL_STATES:
                return
            last = run
            time.sleep(poll_s)

    def wait(self, run_id: str, *, on_update: Callable[[Json], None] | None = None, poll_s: float = 0.5) -> Json:
        """Wait until a run has ended, and return it; `on_update` is told of every change."""
        run: Json = {}
        for run in self.watch(run_id, poll_s=poll_s):
            if on_update is not None:
                on_update(run)
        return run

    def events(self, run_id: str, *, after: int = 0, limit: int | None = None) -> Json:
        """One page of the run's log after entry `after`; `next` is where to go on, also at the end."""
        return self._object(f"{_run(run_id)}/events", after=after, limit=limit)

    def logs(
        self,
        run_id: str,
        *,
        rank: int | str = 0,
        attempt: int | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> Json:
        """One page of log lines (``{"attempt", "rank", "text"}``) of a rank, or of ``"driver"``.

        `attempt` None reads all attempts in order. `next` is where to go on, also at the end.
        """
        return self._object(f"{_run(run_id)}/logs", rank=rank, attempt=attempt, after=after, limit=limit)

    def metrics(self, run_id: str, *, after: str | None = None, limit: int | None = None) -> Json:
        """One page of metric lines, oldest first; `next` is where to go on, also at the end."""
        return self._object(f"{_run(run_id)}/metrics", after=after, limit=limit)

    # -- what a run made ------------------------------------------------------------------------------------

    def checkpoints(self, run_id: str) -> list[Json]:
        """All committed checkpoints in order; `is_abandoned` marks those that no average counts."""
        return list(self._object(f"{_run(run_id)}/checkpoints")["data"])

    def averages(self, run_id: str) -> list[Json]:
        """The run's averages, as they were asked for."""
        return list(self._object(f"{_run(run_id)}/averages")["data"])

    def add_average(
        self,
        run_id: str,
        name: str,
        rule: str,
        *,
        accumulator_dtype: str | None = None,
        dry_run: bool = False,
    ) -> Json:
        """Add an average, also to a run that has ended; its `prediction` says how it catches up, and how well.

        With `dry_run` nothing is added. `ApiError` with the code ``cannot_rebuild`` says that too little is kept,
        ``average_exists`` that the name is taken.
        """
        body: Json = {"name": name, "rule": rule, "dry_run": dry_run}
        if accumulator_dtype is not None:
            body["accumulator_dtype"] = accumulator_dtype
        return dict(self._transport.post(f"{_run(run_id)}/averages", body=body))

    def average(
        self,
        run_id: str,
        name: str,
        *,
        generation: int | None = None,
        step: int | None = None,
        at: str | None = None,
    ) -> Json:
        """One average: its newest state, or that of a generation, of a step, or ``at="best"``."""
        return self._object(_average(run_id, name), generation=generation, step=step, at=at)

    def predict(
        self,
        run_id: str,
        name: str,
        instances: list[Any],
        *,
        generation: int | None = None,
        step: int | None = None,
        at: str | None = None,
    ) -> Json:
        """Ask published weights; ``predictions`` has one for each of `instances`, and the rest names the weights.

        `ApiError` with the code ``invalid_instances`` says what is wrong with which, ``prediction_not_supported``
        that the run's recipe cannot be asked.
        """
        query: Query = {"generation": generation, "step": step, "at": at}
        body = {"instances": instances}
        return dict(self._transport.post(f"{_average(run_id, name)}:predict", body=body, query=query))

    def model_card(self, run_id: str, name: str, *, generation: int | None = None) -> str:
        """The model card of published weights: Markdown, with the front matter of a Hugging Face repository."""
        path = f"{_average(run_id, name)}/model-card"
        with self._transport.stream(path, query={"generation": generation}) as response:
            return response.read().decode()

    def model_config(self, run_id: str, name: str, *, generation: int | None = None) -> Json:
        """What it takes to build the model of published weights: recipe, package, config, seed."""
        return self._object(f"{_average(run_id, name)}/config.json", generation=generation)

    def coefficients(self, run_id: str, name: str, *, generation: int | None = None) -> Json:
        """The checkpoints in published weights, each with its coefficient and sha256, as ``data``."""
        return self._object(f"{_average(run_id, name)}/coefficients", generation=generation)

    def provenance(self, run_id: str, name: str, *, generation: int | None = None) -> Json:
        """What published weights were made of, and how: an in-toto statement."""
        return self._object(f"{_average(run_id, name)}/provenance", generation=generation)

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
        query: dict[str, str | int | float | None] = {"step": at} if isinstance(at, int) else {"at": at}
        query["generation"] = generation
        return fetch_file(
            self._transport, f"{_average(run_id, name)}/{quote(file)}", path, query=query, on_progress=on_progress
        )

    def _object(self, path: str, **query: str | float | None) -> Json:
        return dict(self._transport.get(path, query=dict(query)))


def _run(run_id: str) -> str:
    return f"/v1/runs/{quote(run_id, safe='')}"


def _average(run_id: str, name: str) -> str:
    return f"{_run(run_id)}/averages/{quote(name, safe='')}"
