"""The `wa` command as a process, and a scripted service for it to talk to."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from support.answering import answering

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.command_nursery import CommandNursery

RUN_ID = "01JZ8W6J5N1V3C9T7Q2R4S6X8Y"
TOKEN = "right"


def run_resource(**changes: Any) -> dict[str, Any]:
    """A run as the API shows it."""
    return {
        "run_id": RUN_ID,
        "state": "succeeded",
        "averaging_state": "published",
        "reason": None,
        "recipe": "services.recipes.digits:Digits",
        "config": {},
        "labels": {},
        "step": 40,
        "total_steps": 40,
        "attempt": 1,
        "metrics": {"loss": 0.25},
        "created_at": "2026-11-22T08:00:00Z",
        "updated_at": "2026-11-22T08:01:00Z",
    } | changes


def average_resource(**changes: Any) -> dict[str, Any]:
    """An average as the API shows it."""
    evaluation = {
        "raw": {"step": 40, "loss": 0.5, "accuracy": 0.9},
        "averaged": {"step": 40, "loss": 0.25, "accuracy": 0.95},
        "before_recalibration": {"step": 40, "loss": 0.75, "accuracy": 0.8},
        "comparison": {
            "metric": "loss",
            "difference": -0.25,
            "low": -0.304,
            "high": -0.1,
            "confidence": 0.95,
            "num_samples": 360,
            "unit": "sample",
            "won": "averaged",
        },
        "won": "averaged",
    }
    return {
        "name": "swa",
        "rule": "swa",
        "n_averaged": 2,
        "first_step": 20,
        "last_step": 40,
        "behind": 0,
        "evaluation": evaluation,
    } | changes


@dataclass
class Service:
    """A service whose answers a test writes down: (method, path) -> (status, JSON).

    A list is answered one after the other, the last one for ever. Requests are kept, to be looked at.
    """

    url: str = ""
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)

    def says(self, path: str, *answers: Any, method: str = "GET", status: int = 200) -> None:
        """Answer `path` with these, in order."""
        self.answers[method, path] = [(status, answer) for answer in answers]

    def next_answer(self, method: str, path: str) -> tuple[int, Any]:
        """What to say now."""
        script = self.answers.get((method, path))
        if script is None:
            return 404, {"detail": f"nothing at {path}", "code": "run_not_found"}
        return script.pop(0) if len(script) > 1 else script[0]


@dataclass
class Wa:
    """The `wa` command in a folder of its own, with nothing of the developer's environment."""

    folder: Path
    environment: dict[str, str]
    nursery: CommandNursery

    def with_variables(self, **variables: str) -> Wa:
        """The same with more of an environment."""
        return replace(self, environment=self.environment | variables)

    def __call__(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run it to its end, with `stdin` piped in."""
        if self.nursery.can_run(self.environment):
            environment = self.environment
            return self.nursery.run(arguments, folder=self.folder, environment=environment, stdin=stdin)
        return subprocess.run(
            [sys.executable, "-m", "services.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it and go on."""
        return subprocess.Popen(
            [sys.executable, "-m", "services.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@contextmanager
def serving(service: Service) -> Iterator[None]:
    """Serve what `service` says until the block is left."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def do_DELETE(self) -> None:
            self._answer("DELETE")

        def log_message(self, *_: object) -> None:
            return

        def _answer(self, method: str) -> None:
            path = urlsplit(self.path).path
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length)
            is_json = self.headers.get("Content-Type") == "application/json"
            body = json.loads(sent) if is_json and sent else sent or None
            service.requests.append((method, self.path, body))
            status, answer = service.next_answer(method, path)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, answer = 401, {"detail": "no token was given", "code": "auth_missing"}
            content = json.dumps(answer).encode() if status != 204 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with answering(Handler) as server:
        service.url = f"http://127.0.0.1:{server.server_port}"
        yield
