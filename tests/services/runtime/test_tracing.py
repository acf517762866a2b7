"""Traces as a collector sees them: real processes send their spans to a receiver of OTLP over HTTP."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from services.runtime import tracing
from support.answering import answering
from support.api import submission
from support.patience import eventually
from support.ports import free_port
from support.runs import random_weights
from support.training import start_attempt
from wa_core import layout
from wa_core.catalog.files import put_file
from wa_core.catalog.runs import RunLog, fetch_spec
from wa_core.clock import SystemClock
from wa_core.records import CheckpointCommitted, RunState, TrainingFinished
from wa_core.store.local import LocalStore
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE}-00f067aa0ba902b7-01"


@dataclass(frozen=True, slots=True)
class Seen:
    """One span that arrived."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]


@dataclass(slots=True)
class Collector:
    """What has arrived so far."""

    url: str = ""
    spans: list[Seen] = field(default_factory=list)

    def wait_for(self, *names: str, seconds: float = 60.0) -> dict[str, Seen]:
        """The newest spans of these names, once there is one of each."""
        deadline = time.monotonic() + seconds
        while not set(names) <= {span.name for span in self.spans}:
            assert time.monotonic() < deadline, f"only {sorted({span.name for span in self.spans})} came"
            time.sleep(0.02)
        return {span.name: span for span in self.spans if span.name in names}


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A receiver of OTLP/HTTP on a free port."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            if self.path == "/v1/traces":
                found.spans += spans_in(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing."""

    with answering(Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        yield found


def spans_in(body: bytes) -> list[Seen]:
    """The spans of one export."""
    request = ExportTraceServiceRequest()
    request.ParseFromString(body)
    return [
        Seen(
            service=values_in(each.resource.attributes)["service.name"],
            name=span.name,
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            attributes=values_in(span.attributes),
        )
        for each in request.resource_spans
        for scope in each.scope_spans
        for span in scope.spans
    ]


def values_in(attributes: Any) -> dict[str, Any]:
    """Attributes as a dict."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def process(module: str, bucket: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of ours, ended by SIGTERM."""
    variables = {"WA_STORE_URL": f"file://{bucket}", "WA_LOG_FORMAT": "json"} | environment
    started = subprocess.Popen([sys.executable, "-m", module], env=os.environ | variables, stderr=subprocess.PIPE)
    try:
        yield started
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=60)
    finally:
        started.kill()
        started.wait(60)


def submitted(port: int) -> str:
    """A run submitted as part of a caller's trace."""
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:

        def is_up() -> bool:
            try:
                return http.get("/readyz").status_code == 200
            except httpx2.TransportError:
                return False

        eventually(is_up, what="the API's start")
        body = submission(averages=[{"name": "swa", "rule": "swa"}])
        return str(http.post("/v1/runs", json=body, headers={"traceparent": CALLER}).json()["run_id"])


def test_one_trace_joins_a_submission_its_attempt_and_its_averages(tmp_path: Path, collector: Collector) -> None:
    """API, runner and averager, each a process: their spans arrive with the trace id that the caller began."""
    bucket, port = tmp_path / "bucket", free_port()
    store = LocalStore(bucket)
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    with process("services.api", bucket, WA_API_PORT=str(port), **endpoint):
        run_id = submitted(port)
        asked = collector.wait_for("POST /v1/runs")["POST /v1/runs"]
    spec = fetch_spec(store, run_id)
    assert (asked.trace_id, asked.parent_id) == (TRACE, CALLER.split("-")[2])
    assert spec.traceparent == f"00-{TRACE}-{asked.span_id}-01"
    assert asked.attributes["http.response.status_code"] == 202

    start_attempt(store, run_id)
    log = RunLog(store, run_id, clock=SystemClock())
    log.refresh()
    prefix = layout.checkpoint_prefix(run_id, attempt=1, step=20, nonce=layout.new_nonce())
    weights = random_weights(1)
    ref = put_file(store, prefix + layout.MODEL_FILE, serialize(weights))
    log.append(CheckpointCommitted(step=20, files={layout.MODEL_FILE: ref}, spec_digest="0" * 64, is_last=True))
    log.append(TrainingFinished(step=20))
    with process("services.averager", bucket, **endpoint):
        done = collector.wait_for("fold", "publish", "assess", "serve")
        eventually(lambda: log.refresh() or log.state is RunState.SUCCEEDED, what="the run's end")
    assert {span.trace_id for span in done.values()} == {TRACE}
    assert {span.parent_id for span in done.values()} == {asked.span_id}
    assert {span.service for span in done.values()} == {"wa-averager"}
    assert done["fold"].attributes == {"wa.run_id": run_id, "wa.step": 20, "wa.averages": "swa"}
    assert not any("livez" in span.name or "readyz" in span.name for span in collector.spans)


def test_without_an_endpoint_nothing_is_loaded() -> None:
    """Tracing is off unless asked for; then no process loads what makes and sends spans.

    FastAPI itself loads the bare interface (`opentelemetry.trace`), which does nothing alone.
    """
    code = (
        "import sys\n"
        "import services.api.__main__, services.averager.__main__\n"
        "import services.trainer.__main__, services.notifier.__main__\n"
        "from services.runtime import tracing; from services.runtime.settings import Settings\n"
        "tracing.install('api', Settings())\n"
        "ours = ('services.runtime.otel', 'opentelemetry.sdk', 'opentelemetry.exporter', 'opentelemetry.proto')\n"
        "print([tracing.is_on(), *(name for name in sys.modules if name.startswith(ours))])"
    )
    for switch in ({}, {"WA_TRACING": "0", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | switch, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[False]"


def test_a_collector_that_is_away_keeps_no_process_from_ending(tmp_path: Path) -> None:
    """Fault F28: SIGTERM still ends the API within 10 s with status 0, and requests are answered meanwhile."""
    port = free_port()
    LocalStore(tmp_path / "bucket")
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "WA_API_PORT": str(port)}
    with process("services.api", tmp_path / "bucket", **environment) as api:
        submitted(port)
        began_at = time.monotonic()
        api.send_signal(signal.SIGTERM)
        api.communicate(timeout=60)
        assert time.monotonic() - began_at < 10
        assert api.returncode == 0


@pytest.mark.parametrize(
    "sent", [None, "", "x", CALLER.upper(), CALLER + "-00", f"00-{'0' * 32}-00f067aa0ba902b7-01"]
)
def test_what_is_no_traceparent_is_not_taken_over(sent: str | None) -> None:
    """A header that is not of the W3C's form begins no trace."""
    assert tracing.parse_traceparent(sent) is None
    assert tracing.parse_traceparent(CALLER) == CALLER


def test_without_tracing_a_callers_trace_is_handed_on() -> None:
    """A process that does not trace passes the parent on, so those behind it still join the caller's trace."""
    with tracing.span("anything", parent=CALLER) as span:
        assert span.traceparent == CALLER
    assert not tracing.is_on()
