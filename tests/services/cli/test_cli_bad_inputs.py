"""Bad inputs of the command line, by their number in the list of failures: exit code, clear line, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest

from support.command import RUN_ID, average_resource, run_resource
from support.patience import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from support.command import Service, Wa

RUN = f"/v1/runs/{RUN_ID}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs"],
        ["show", RUN_ID],
        ["submit", "digits"],
        ["submit", "digits", "--follow"],
        ["averages", RUN_ID],
        ["logs", RUN_ID, "--follow"],
        ["events", RUN_ID, "--follow"],
        ["download", RUN_ID, "-o", "x"],
    ],
)
def test_75_no_server_is_exit_3_in_one_line(lonely_wa: Wa, arguments: list[str]) -> None:
    """Without a service: exit 3 at once, one line that says where it was looked for and how to start one."""
    began = time.monotonic()

    done = lonely_wa(*arguments)

    assert time.monotonic() - began < 30

    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "127.0.0.1:9" in done.stderr
    assert "wa up" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["runs", "--bad"], "--bad"),
        (["runs", "--limit", "0"], "--limit"),
        (["submit", "digits", "-c", "epochs"], "-c"),
        (["submit", "digits", "--average", "ema:half_life=0"], "--average"),
        (["submit", "digits", "--average", "nope"], "--average"),
        (["submit", "digits", "--average", "a=swa", "--average", "a=swa"], "--average"),
        (["submit", "digits", "--average", "Not_A_Name=swa"], "--average"),
        (["submit", "digits", "--label", "x"], "--label"),
        (["submit", "digits", "--workers", "0"], "--workers"),
        (["submit", "digit"], "RECIPE"),
        (["download", RUN_ID, "--at", "sometimes", "--average", "swa", "-o", "x"], "--at"),
        (["download", RUN_ID], "--output"),
        (["show"], "RUN"),
    ],
)
def test_76_a_bad_option_is_exit_2_with_its_place(wa: Wa, arguments: list[str], place: str) -> None:
    """Wrong usage: exit 2, and the message names the option or argument."""
    done = wa(*arguments)

    assert done.returncode == 2
    assert place in done.stderr
    assert "Traceback" not in done.stderr


def test_76_a_body_that_the_service_refuses_is_wrong_usage_too(wa: Wa, service: Service) -> None:
    """What only the service can judge is exit 2 as well, with the pointer it gave."""
    refusal = {
        "detail": "the body is not valid",
        "code": "invalid_config",
        "errors": [{"pointer": "/config/epochs", "message": "must be at least 1"}],
    }
    service.says("/v1/runs", refusal, method="POST", status=422)

    done = wa("submit", "digits", "-c", "epochs=0")

    assert done.returncode == 2
    assert "/config/epochs: must be at least 1" in done.stderr


def test_77_an_unknown_command_is_exit_2_with_a_suggestion(wa: Wa) -> None:
    """A typing error gets the command that was meant."""
    done = wa("dowload")

    assert done.returncode == 2
    assert "Did you mean 'download'?" in done.stderr


def test_78_a_missing_token_says_how_to_get_one(wa: Wa) -> None:
    """401 is answered with the ways to give and to find a token."""
    wa.environment.pop("WA_TOKEN")

    done = wa("runs")

    assert done.returncode == 1
    assert "WA_TOKEN" in done.stderr
    assert "wa env" in done.stderr


def test_79_an_unwritable_output_is_refused_before_downloading(wa: Wa, service: Service) -> None:
    """Nothing is fetched for a file that cannot be written."""
    (wa.folder / "file").write_text("")

    done = wa("download", RUN_ID, "--average", "swa", "-o", "file/x.safetensors")

    assert done.returncode == 1
    assert "file/x.safetensors" in done.stderr
    assert not [path for _, path, _ in service.requests if "weights" in path]


@pytest.mark.parametrize("output", [".", "/", "pipe"])
def test_79_an_output_that_is_no_file_is_refused_before_downloading(wa: Wa, service: Service, output: str) -> None:
    """A folder, and a device or pipe that a download would replace by a file: exit 1, and it is still there."""
    os.mkfifo(wa.folder / "pipe")

    done = wa("download", RUN_ID, "--average", "swa", "-o", output)

    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "name a file to write" in done.stderr
    assert (wa.folder / "pipe").is_fifo()
    assert not [path for _, path, _ in service.requests if "weights" in path]


def test_80_ctrl_c_while_following_leaves_the_run_alone(wa: Wa, service: Service) -> None:
    """Ctrl-C ends the following, not the run, and says so: exit 130."""
    service.says("/v1/runs", run_resource(state="queued"), method="POST", status=202)
    service.says(RUN, run_resource(state="running", step=10))
    service.says(f"{RUN}/averages", {"data": []})

    following = wa.start("submit", "digits", "--follow")
    assert following.stderr is not None
    try:
        lines = [following.stderr.readline(), following.stderr.readline()]
        following.send_signal(signal.SIGINT)
        _, rest = following.communicate(timeout=60)
    finally:
        following.kill()
        following.communicate()

    assert following.returncode == 130
    assert "running" in lines[1]
    assert f"run {RUN_ID} goes on" in rest
    assert not [path for _, path, _ in service.requests if path.endswith(":cancel")]


def test_81_following_a_failing_run_ends_with_its_last_log_lines(wa: Wa, service: Service) -> None:
    """A failed run is exit 1, with the reason and the last 20 lines that it wrote."""
    service.says("/v1/runs", run_resource(state="queued"), method="POST", status=202)
    reason = {"code": "user_code", "message": "ValueError: no such thing"}
    service.says(RUN, run_resource(state="running"), run_resource(state="failed", reason=reason))
    service.says(f"{RUN}/averages", {"data": []})
    written = [{"attempt": 1, "rank": "0", "text": f"line {number}."} for number in range(30)]
    service.says(f"{RUN}/logs", {"data": written, "has_more": False, "next": None})

    done = wa("submit", "digits", "--follow")

    assert done.returncode == 1
    assert "ValueError: no such thing" in done.stderr
    assert "line 10." in done.stderr
    assert "line 29." in done.stderr
    assert "line 9." not in done.stderr


def test_82_piped_output_has_neither_colour_nor_bar(wa: Wa, service: Service) -> None:
    """A pipe gets plain text, even where colour is forced by the environment."""
    service.says("/v1/runs", {"data": [run_resource()], "has_more": False, "next": None})
    service.says("/v1/runs", run_resource(state="queued"), method="POST", status=202)
    service.says(RUN, run_resource(state="running", step=10), run_resource())
    service.says(f"{RUN}/averages", {"data": [average_resource()]})
    wa.environment |= {"FORCE_COLOR": "1"}

    done = [wa("runs"), wa("submit", "digits", "--follow"), wa("averages", RUN_ID)]

    assert [one.returncode for one in done] == [0, 0, 0]
    text = "".join(one.stdout + one.stderr for one in done)
    assert "\x1b" not in text
    assert not set("━─│╭█") & set(text)


@pytest.mark.parametrize("arguments", [["version"], ["runs"], ["runs", "--json"], ["runs", "--help"]])
def test_82_an_output_without_room_is_one_line(wa: Wa, service: Service, arguments: list[str]) -> None:
    """A full disk behind `>` is exit 1 and said in words; it is no fault of the program's to report."""
    service.says("/v1/runs", {"data": [run_resource()], "has_more": False, "next": None})

    with Path("/dev/full").open("w") as full:
        done = called(wa, arguments, stdout=full)

    assert (done.returncode, done.stderr) == (1, "wa: No space left on device\n")


@pytest.mark.parametrize("arguments", [["version"], ["runs"], ["runs", "--json"]])
def test_82_a_closed_output_is_no_error(wa: Wa, service: Service, arguments: list[str]) -> None:
    """`wa runs >&-` does what it does and says nothing."""
    service.says("/v1/runs", {"data": [run_resource()], "has_more": False, "next": None})

    done = called(wa, arguments, through=["sh", "-c", 'exec "$@" >&-', "sh"])

    assert (done.returncode, done.stderr) == (0, "")


def called(
    wa: Wa, arguments: list[str], *, stdout: TextIO | None = None, through: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command with its output elsewhere."""
    command = [*through, sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(
        command,
        cwd=wa.folder,
        env=wa.environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_unexpected_error_is_one_line_without_a_traceback(wa: Wa, service: Service) -> None:
    """Even an answer that makes no sense gives one line; WA_DEBUG=1 shows where."""
    service.says(RUN, {"what": "is this"})
    service.says(f"{RUN}/averages", {"data": []})

    done = wa("show", RUN_ID)

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "WA_DEBUG=1" in done.stderr


def test_ctrl_c_anywhere_else_is_exit_130(wa: Wa, service: Service) -> None:
    """Interrupting a command that waits is no error with a traceback."""
    service.says(RUN, run_resource(state="running"))
    service.says(f"{RUN}/events", {"data": [], "has_more": False, "next": 0})

    waiting = wa.start("events", RUN_ID, "--follow")
    try:
        eventually(lambda: service.requests, what="the first request")
        os.kill(waiting.pid, signal.SIGINT)
        _, said = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
        waiting.communicate()

    assert waiting.returncode == 130
    assert "Traceback" not in said
