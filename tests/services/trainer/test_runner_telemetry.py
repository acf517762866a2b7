"""What a runner tells Prometheus, and that its process does so over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from prometheus_client import REGISTRY

from services.trainer import telemetry
from services.trainer.runner import Runner, RunnerConfig
from support import scripted_driver
from support.ports import answered, free_port
from support.ticked_runner import tick_until
from support.training import digits_request, log_of, submit_run
from wa_core.clock import SystemClock
from wa_core.records import RunState
from wa_core.store.local import LocalStore


def value(name: str, **labels: str) -> float:
    """A metric now."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_attempts_failures_and_states_are_told(tmp_path: Path) -> None:
    """One attempt fails, for a reason of the test's own, and the next one finishes: all of that is counted."""
    store = LocalStore(tmp_path / "bucket")
    run_id = submit_run(store, digits_request())
    driver = (sys.executable, str(Path(scripted_driver.__file__)), str(tmp_path / "bucket"), "die,finish")
    config = RunnerConfig("here/1/1/x", driver=driver, look_around_interval_s=0.0, folder=tmp_path)
    runner = Runner(store, config, SystemClock(), totals=lambda: {"CPU": 4})
    attempts, died = "wa_runner_attempts_total", "wa_runner_failed_attempts_total"
    before = value(attempts), value(died, reason="other"), value("wa_runner_queue_seconds_count")

    tick_until(runner, lambda: log_of(store, run_id).state is RunState.FINALIZING)
    tick_until(runner, lambda: not runner.held)
    runner.tick()
    runner.shut_down()

    after = value(attempts), value(died, reason="other"), value("wa_runner_queue_seconds_count")
    assert [new - old for new, old in zip(after, before, strict=True)] == [2, 1, 1]
    assert value("wa_runner_runs", state="finalizing") == 1
    assert value("wa_runner_runs", state="queued") == value("wa_runner_queued_runs") == 0
    assert runner.idle_s() < 60


def test_a_reason_that_nobody_knows_is_no_label_of_its_own() -> None:
    """User code may raise with any code; only those that this project gives become time series."""
    assert telemetry.known("driver_died") == "driver_died"
    assert telemetry.known("r4nd0m") == "other"


def test_a_runner_process_answers_probes_and_logs_json(tmp_path: Path) -> None:
    """With WA_RUNNER_PORT it says that it lives, is ready, and what it counts; SIGTERM ends it with status 0."""
    LocalStore(tmp_path / "bucket")
    port = free_port()
    settings = {
        "WA_STORE_URL": f"file://{tmp_path / 'bucket'}",
        "WA_RUNNER_PORT": str(port),
        "WA_LOG_FORMAT": "json",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "services.trainer"], env=os.environ | settings, stderr=subprocess.PIPE
    )
    try:
        answers = {path: answered(f"http://127.0.0.1:{port}{path}") for path in ("/livez", "/readyz", "/metrics")}
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()

    lines = [json.loads(line) for line in said.splitlines()]
    assert {answer.status_code for answer in answers.values()} == {200}
    assert "wa_runner_attempts_total 0.0" in answers["/metrics"].text
    assert 'wa_store_operation_seconds_count{operation="list"}' in answers["/metrics"].text
    assert 'service="runner"' in answers["/metrics"].text
    assert process.returncode == 0
    assert [line["event"] for line in lines] == ["runner_ready", "runner_stopped"]
    assert {line["service"] for line in lines} == {"runner"}
