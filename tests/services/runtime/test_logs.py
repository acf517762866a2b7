"""Log lines as an operator reads them: written by a process of its own, whose stderr is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SETUP = """
import logging, sys, threading, structlog
from structlog.contextvars import bound_contextvars
from services.runtime.telemetry import configure_logging
log = structlog.get_logger("test")
configure_logging("averager", log_format="json", run_id="R", attempt=2)
"""


def said(code: str) -> list[dict[str, Any]]:
    """The lines of a process that runs `code` after the set-up."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code], capture_output=True, text=True, check=True, timeout=60
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_says_whose_it_is_from_any_thread() -> None:
    """Service, run and attempt are in each line, also in those of threads, which inherit no context."""
    lines = said(
        "log.info('here')\n"
        "thread = threading.Thread(target=lambda: log.warning('there', step=3)); thread.start(); thread.join()"
    )

    about = {"service": "averager", "run_id": "R", "attempt": 2}
    assert [(line["event"], line["level"]) for line in lines] == [("here", "info"), ("there", "warning")]
    assert all(about.items() <= line.items() for line in lines)
    assert lines[1]["step"] == 3
    assert lines[0]["timestamp"].endswith("Z")


def test_what_is_being_worked_on_is_said_for_as_long_as_it_lasts() -> None:
    """Ids bound for a while come before those of the process, and go again."""
    lines = said("with bound_contextvars(run_id='S', request_id='q'): log.info('a')\nlog.info('b')")

    assert [(line["run_id"], line.get("request_id")) for line in lines] == [("S", "q"), ("R", None)]


def test_warnings_of_libraries_are_lines_like_ours() -> None:
    """What a library logs is JSON too, with the name of its logger; what it says in passing is left out."""
    lines = said(
        "logging.getLogger('uvicorn.error').info('passing')\n"
        "logging.getLogger('uvicorn.error').warning('odd %s', 'thing')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('botocore').exception('broken')"
    )

    assert [(line["event"], line["logger"]) for line in lines] == [
        ("odd thing", "uvicorn.error"),
        ("broken", "botocore"),
    ]
    assert lines[0]["service"] == "averager"
    assert "ZeroDivisionError" in lines[1]["exception"]


def test_lines_follow_stderr_where_it_goes() -> None:
    """A logger that has written before writes to the stderr of the moment: so a trainer's lines are shipped."""
    lines = said(
        "import contextlib, io\n"
        "log.info('before')\n"
        "with contextlib.redirect_stderr(io.StringIO()) as caught: log.info('inside')\n"
        "assert 'inside' in caught.getvalue()"
    )

    assert [line["event"] for line in lines] == ["before"]
