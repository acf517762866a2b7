"""The probes and metrics of a worker over HTTP."""

from __future__ import annotations

import socket

import httpx2
import pytest

from services.averager import telemetry
from services.runtime.exposition import STUCK_AFTER_S, exposed
from wa_core.errors import ConfigurationError


def get(port: int, path: str) -> httpx2.Response:
    """One request, past any proxy of this machine."""
    with httpx2.Client(trust_env=False) as http:
        return http.get(f"http://127.0.0.1:{port}{path}")


def test_a_worker_that_gets_on_is_ready() -> None:
    """`/readyz` is 200 while work gets on and 503 with a reason once it does not; `/livez` is 200 all the time."""
    idle_s = 0.0
    with exposed("127.0.0.1", 0, variable="WA_X_PORT", idle_s=lambda: idle_s) as port:
        assert get(port, "/readyz").status_code == 200
        idle_s = STUCK_AFTER_S
        answer = get(port, "/readyz")
        assert (answer.status_code, "60 s" in answer.text) == (503, True)
        assert get(port, "/livez").status_code == 200


def test_metrics_are_prometheus_text_without_run_ids() -> None:
    """What is counted can be scraped, and no label's values grow with the number of runs."""
    telemetry.READ_BYTES.inc(5)
    with exposed("127.0.0.1", 0, variable="WA_X_PORT", idle_s=lambda: 0.0) as port:
        text = get(port, "/metrics").text
    for name in (
        "folds",
        "rejected",
        "conflicts",
        "read_bytes",
        "written_bytes",
        "fold_seconds",
        "assess_seconds",
    ):
        assert f"wa_averager_{name}" in text
    assert "behind_checkpoints" in text
    assert "run_id" not in text


def test_other_paths_are_not_found() -> None:
    """An unknown path says which there are."""
    with exposed("127.0.0.1", 0, variable="WA_X_PORT", idle_s=lambda: 0.0) as port:
        answer = get(port, "/")
    assert (answer.status_code, "/readyz" in answer.text) == (404, True)


def test_a_taken_port_is_said() -> None:
    """A port that cannot be had is a configuration error that names the variable."""
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ConfigurationError, match="WA_X_PORT"),
        exposed("127.0.0.1", other.getsockname()[1], variable="WA_X_PORT", idle_s=lambda: 0.0),
    ):
        raise AssertionError("it was taken")
