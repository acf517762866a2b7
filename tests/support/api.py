"""Runs as the API sees them, written straight into the bucket without torch, and the API on a real socket."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from services.api.app import create_app
from services.api.state.budget import Budget
from services.runtime.lifecycle import Stop
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.runs import RunLog, add_average, submit
from wa_core.clock import SystemClock
from wa_core.records import (
    Assessment,
    AssessmentRecord,
    AttemptStarted,
    AverageManifest,
    AverageRequest,
    BatchNormSummary,
    CheckpointCommitted,
    Comparison,
    Evaluation,
    FileRef,
    Heartbeat,
    RunRequest,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Mapping

    from fastapi import FastAPI

    from services.api.access.guard import GuardLimits
    from services.api.answers.predictions import Predictor
    from services.api.state.catalog import Catalog
    from wa_core.store.base import ObjectStore

DIGITS = "services.recipes.digits:Digits"
TOKEN = "correct-horse"


def submission(**fields: object) -> dict[str, object]:
    """A good submission, with `fields` put over it."""
    return {"recipe": DIGITS, "averages": [{"name": "swa", "rule": "swa:start_step=20"}]} | fields


class ApiRun:
    """A run whose trainer and averager are played by the test; a new one, unless `run_id` was submitted before."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        averages: Mapping[str, str] | None = None,
        labels: dict[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        self.store = store
        self.clock = SystemClock()
        wanted = {"swa": "swa:start_step=20"} if averages is None else averages
        requested = [AverageRequest(name=name, rule=rule) for name, rule in wanted.items()]
        request = RunRequest(recipe=DIGITS, averages=requested, labels=labels or {})
        self.run_id = run_id or submit(store, request, clock=self.clock).run_id
        self.log = RunLog(store, self.run_id, clock=self.clock)

    def start(self, *, resumed_from: int | None = None) -> ApiRun:
        """Let a runner take it."""
        self.log.append(AttemptStarted(runner_id="test", resumed_from=resumed_from))
        return self

    def beat(
        self,
        *,
        step: int,
        attempt: int = 1,
        total_steps: int = 264,
        steps_per_s: float | None = None,
        **metrics: float,
    ) -> None:
        """Write the trainer's heartbeat."""
        beat = Heartbeat(
            who="trainer",
            at=self.clock.now(),
            attempt=attempt,
            step=step,
            total_steps=total_steps,
            steps_per_s=steps_per_s,
            metrics=metrics,
        )
        self.store.put(layout.heartbeat(self.run_id, "trainer"), beat.model_dump_json().encode())

    def checkpoint(self, step: int, **metrics: float) -> CheckpointCommitted:
        """Commit a checkpoint."""
        attempt, nonce = self.log.attempt, layout.new_nonce()
        prefix = layout.checkpoint_prefix(self.run_id, attempt=attempt, step=step, nonce=nonce)
        ref = self._file(f"checkpoint {step}".encode(), key=prefix + layout.MODEL_FILE)
        entry = CheckpointCommitted(
            step=step, files={layout.MODEL_FILE: ref}, spec_digest="0" * 64, metrics=metrics
        )
        return self.log.append(entry)

    def add(self, name: str, *, rule: str = "swa:start_step=20") -> None:
        """Add an average."""
        add_average(self.store, self.run_id, AverageRequest(name=name, rule=rule), clock=self.clock)

    def fold(self, name: str = "swa", *, body: bytes | None = None, loss: float | None = 0.5) -> AverageManifest:
        """Publish the next generation over the whole lineage; with `body`, assessed and with weights."""
        generations = Generations(self.store, self.run_id, name)
        number = max(generations.numbers(), default=0) + 1
        counted = self.log.lineage
        manifest = AverageManifest(
            run_id=self.run_id,
            name=name,
            generation=number,
            at=self.clock.now(),
            rule="swa:start_step=20",
            accumulator_dtype="float64",
            cursor=self.log.entries[-1].seq,
            folded=[entry.seq for entry in counted],
            coefficients={entry.step: 1 / len(counted) for entry in counted},
        )
        generations.commit(manifest)
        if body is not None:
            self.assess(name, body=body, loss=loss)
        return manifest

    def assess(
        self,
        name: str = "swa",
        *,
        body: bytes = b"weights",
        loss: float | None = 0.5,
        raw_loss: float | None = None,
    ) -> AssessmentRecord:
        """Commit the newest generation's assessment, with `body` as its weights."""
        generations = Generations(self.store, self.run_id, name)
        number = generations.numbers()[-1]
        key = layout.blob(self.run_id, name, nonce=layout.new_nonce(), file=layout.MODEL_FILE)
        assessment = _assessment(self.log.lineage[-1].step, loss=loss, raw_loss=raw_loss or loss)
        record = AssessmentRecord(
            run_id=self.run_id,
            name=name,
            generation=number,
            at=self.clock.now(),
            files={layout.MODEL_FILE: self._file(body, key=key)},
            assessment=assessment,
            best=generations.best_with(number, assessment),
        )
        generations.commit_assessment(record)
        return record

    def _file(self, body: bytes, *, key: str) -> FileRef:
        self.store.put(key, body)
        return FileRef(key=key, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())


def app_over(store: ObjectStore, **options: Any) -> FastAPI:
    """The API over one bucket, whose answers are never old ones because this machine was kept from its work."""
    app = create_app(store=store, **options)
    take_time_to_look(app.state.catalog)
    return app


def take_time_to_look(catalog: Catalog) -> None:
    """Let each request have its look at the bucket, however long those before it took."""
    catalog._looks = Budget(share=1.0, most_s=1e9, clock=catalog.clock)
    catalog.index._budget = Budget(share=1.0, most_s=1e9, clock=catalog.clock)


@contextmanager
def serving(
    store: ObjectStore,
    *,
    token: str | None = None,
    guard: GuardLimits | None = None,
    predictor: Predictor | None = None,
    protocol: type[asyncio.Protocol] | None = None,
    port: int = 0,
) -> Iterator[str]:
    """The API's address, while it serves on a loopback port, free unless given, in a thread."""
    stop = Stop()
    app = app_over(store, token=token, stop=stop, guard=guard, predictor=predictor)
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(
        uvicorn.Config(
            app, http=protocol or "auto", log_config=None, access_log=False, timeout_graceful_shutdown=2
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        server.should_exit = True
        thread.join(20)
        listener.close()


def _assessment(step: int, *, loss: float | None, raw_loss: float | None) -> Assessment:
    measured, raw, comparison = None, None, None
    if loss is not None and raw_loss is not None:
        measured = Evaluation(step=step, metrics={"loss": loss, "accuracy": 0.9})
        raw = Evaluation(step=step, metrics={"loss": raw_loss, "accuracy": 0.9})
        difference = loss - raw_loss
        comparison = Comparison(
            metric="loss",
            difference=difference,
            low=difference - 0.01,
            high=difference + 0.01,
            num_samples=100,
            won="averaged" if difference < -0.01 else "raw" if difference > 0.01 else "tie",
        )
    summary = BatchNormSummary(status="recalibrated", num_layers=3, num_batches=4, num_samples=256)
    return Assessment(
        raw=raw, averaged=measured, before_recalibration=measured, batchnorm=summary, comparison=comparison
    )
