"""The commands' good days: what is sent, what is printed, what programs read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from services.cli.demo import table_rows
from services.cli.main import _PANELS
from support.command import RUN_ID, average_resource, run_resource

if TYPE_CHECKING:
    from support.command import Service, Wa

RUN = f"/v1/runs/{RUN_ID}"


def test_submit_sends_what_was_asked_for_and_prints_the_id(wa: Wa, service: Service) -> None:
    """Every option arrives in its field; stdout holds the run's id alone, for `$(wa submit …)`."""
    service.says("/v1/runs", run_resource(state="queued"), method="POST", status=202)

    done = wa(
        *(
            "submit",
            "digits",
            "-c",
            "epochs=3",
            "--workers",
            "4",
            "--min-workers",
            "2",
            "--average",
            "swa:start_step=100",
        ),
        *("--every-steps", "10", "--keep-last", "3", "--keep-best", "1", "--seed", "7"),
        *("--label", "team=vision", "--priority", "5"),
    )

    assert (done.returncode, done.stdout) == (0, f"{RUN_ID}\n")
    assert service.requests == [
        (
            "POST",
            "/v1/runs",
            {
                "recipe": "services.recipes.digits:Digits",
                "config": {"epochs": 3},
                "scaling": {"num_workers": 4, "min_workers": 2},
                "checkpoint": {"every_steps": 10, "keep_last": 3, "keep_best": 1},
                "training": {},
                "averages": [{"name": "swa", "rule": "swa:start_step=100"}],
                "labels": {"team": "vision"},
                "priority": 5,
                "seed": 7,
            },
        )
    ]


def test_submit_sends_a_folder_of_code_first(wa: Wa, service: Service) -> None:
    """With --package the folder is uploaded, and the run names what the service calls it."""
    (wa.folder / "mine").mkdir()
    (wa.folder / "mine" / "moons.py").write_text("class Moons: ...\n")
    package = "sha256:" + "a" * 64
    service.says("/v1/packages", {"package": package}, method="POST", status=201)
    service.says("/v1/runs", run_resource(state="queued"), method="POST", status=202)

    done = wa("submit", "moons:Moons", "--package", "mine")

    assert (done.returncode, done.stdout) == (0, f"{RUN_ID}\n")
    (_, path, _), (_, _, request) = service.requests
    assert (path, request["recipe"], request["package"]) == ("/v1/packages", "moons:Moons", package)


@pytest.mark.parametrize(
    ("recipe", "folder", "message"),
    [("moons:Moons", "nowhere", "is no folder"), ("moons", ".", "names no class")],
)
def test_76_a_package_that_cannot_be_sent_is_a_usage_error(
    wa: Wa, service: Service, recipe: str, folder: str, message: str
) -> None:
    """76: nothing is sent, exit 2, and the option is named."""
    (wa.folder / "moons.py").write_text("")

    done = wa("submit", recipe, "--package", folder)

    assert (done.returncode, service.requests) == (2, [])
    assert message in " ".join(done.stderr.split())


def test_following_shows_progress_and_the_averages(wa: Wa, service: Service) -> None:
    """Plain lines on stderr: state, steps, loss, what is in the average and how it does beside raw."""
    service.says("/v1/runs", run_resource(state="queued"), method="POST", status=202)
    service.says(RUN, run_resource(state="running", step=10, eta_s=750.0), run_resource())
    service.says(f"{RUN}/averages", {"data": [average_resource()]})

    done = wa("submit", "digits", "--follow")

    assert done.returncode == 0
    assert "step 10/40  loss 0.25  12 min left\n" in done.stderr
    assert "swa  n_averaged 2  averaged: loss 0.25, accuracy 0.95  raw: loss 0.5, accuracy 0.9" in done.stderr
    assert "  averaged wins: loss -0.25 [-0.30, -0.10]\n" in done.stderr


def test_who_won_is_said_plainly(wa: Wa, service: Service) -> None:
    """Averaged, raw or a tie, with the difference and its interval; and why where nobody can say."""
    compared = average_resource()["evaluation"]["comparison"]

    def said(**found: object) -> str:
        average = average_resource(evaluation={"comparison": compared | found}, batchnorm={"status": "skipped"})
        service.says(f"{RUN}/averages", {"data": [average]})
        return wa("averages", RUN_ID).stdout

    assert "averaged wins: loss -0.25 [-0.30, -0.10]" in said()
    assert "raw wins: loss 0.012 [0.0050, 0.019]" in said(won="raw", difference=0.012, low=0.005, high=0.019)
    assert "tie: loss 0.0010 [-0.010, 0.012]" in said(won="tie", difference=0.001, low=-0.01, high=0.012)
    failed = average_resource(evaluation={}, batchnorm={"status": "failed", "code": "assess_timeout"})
    service.says(f"{RUN}/averages", {"data": [failed]})
    assert "not compared: assess_timeout" in wa("averages", RUN_ID).stdout
    too_few = average_resource(evaluation={"raw": {"loss": 0.5}, "averaged": {"loss": 0.4}})
    service.says(f"{RUN}/averages", {"data": [too_few]})
    assert "not compared: too few held-out batches, and no evaluate_each" in wa("averages", RUN_ID).stdout


@pytest.mark.parametrize(
    ("command", "path", "answer"),
    [
        (["runs"], "/v1/runs", {"data": [run_resource()], "has_more": False, "next": None}),
        (["show", RUN_ID], RUN, run_resource()),
        (["checkpoints", RUN_ID], f"{RUN}/checkpoints", {"data": []}),
        (["averages", RUN_ID], f"{RUN}/averages", {"data": [average_resource()]}),
    ],
)
def test_json_is_the_api_s_answer(wa: Wa, service: Service, command: list[str], path: str, answer: object) -> None:
    """With --json, stdout is one JSON document: what the API said, nothing rounded or cut."""
    service.says(f"{RUN}/averages", {"data": []})
    service.says(path, answer)

    done = wa(*command, "--json")

    assert done.returncode == 0
    assert json.loads(done.stdout) == answer


def test_logs_and_events_are_json_lines(wa: Wa, service: Service) -> None:
    """Feeds print one JSON document a line, page after page."""
    lines = [{"attempt": 1, "rank": "0", "text": text} for text in ("one", "two")]
    service.says(
        f"{RUN}/logs",
        {"data": lines[:1], "has_more": True, "next": "1"},
        {"data": lines[1:], "has_more": False, "next": "2"},
    )
    event = {"seq": 1, "at": "2026-11-22T08:00:00Z", "kind": "submitted", "state": "queued", "attempt": 0}
    service.says(f"{RUN}/events", {"data": [event], "has_more": False, "next": 1})

    logs, events = wa("logs", RUN_ID, "--json"), wa("events", RUN_ID, "--json")

    assert [json.loads(line) for line in logs.stdout.splitlines()] == lines
    assert [json.loads(line) for line in events.stdout.splitlines()] == [event]


def test_logs_follow_until_the_run_has_ended(wa: Wa, service: Service) -> None:
    """`logs -f` reads once more after the end, so the last line is never lost."""
    page = {"data": [], "has_more": False, "next": "1"}
    last = {"data": [{"attempt": 1, "rank": "0", "text": "the last line"}], "has_more": False, "next": "2"}
    service.says(f"{RUN}/logs", page, page, last)
    service.says(RUN, run_resource(state="running"), run_resource())

    done = wa("logs", RUN_ID, "--follow")

    assert (done.returncode, done.stdout) == (0, "the last line\n")


def test_doctor_fails_when_something_is_wrong_and_names_it(lonely_wa: Wa) -> None:
    """Exit 1, and the check that failed is in the table and in the JSON."""
    done = lonely_wa("doctor", "--json")

    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [one["check"] for one in found["checks"] if not one["is_ok"]] == ["api"]


def test_doctor_is_content_with_a_ready_service(wa: Wa, service: Service) -> None:
    """All checks of the probe are listed by name, and the token is tried."""
    service.says("/readyz", {"status": "ok", "checks": {"second-create-is-refused": "ok"}})
    service.says("/v1/runs", {"data": [], "has_more": False, "next": None})

    done = wa("doctor")

    assert done.returncode == 0
    assert "second-create-is-refused" in done.stdout


def test_down_with_nothing_running_says_so(lonely_wa: Wa) -> None:
    """Stopping what does not run is no error."""
    done = lonely_wa("down")

    assert (done.returncode, done.stdout) == (0, "nothing runs on .wa\n")


def test_the_demo_s_table_shows_raw_and_averages_before_and_after_recalibration() -> None:
    """Raw weights need no recalibration, so both their columns agree; the average's differ."""
    rows = table_rows(run_resource(), [average_resource()])

    assert rows == [
        ["raw, step 40", None, "0.9000", "0.9000", "0.5000", "0.5000"],
        ["SWA swa", 2, "0.8000", "0.9500", "0.7500", "0.2500"],
    ]


@pytest.mark.parametrize("command", [name for commands in _PANELS.values() for name in commands])
def test_every_help_has_an_example(lonely_wa: Wa, command: str) -> None:
    """A newcomer sees how a command is typed."""
    done = lonely_wa(command, "--help")

    assert done.returncode == 0
    assert f"wa {command}" in done.stdout.partition("Example: ")[2]


def test_pause_and_resume_send_what_was_asked_for(wa: Wa, service: Service) -> None:
    """`wa pause`, a plain `wa resume`, and one that goes back with changes: only what was given is sent."""
    service.says(f"{RUN}:pause", run_resource(state="pausing"), method="POST", status=202)
    service.says(f"{RUN}:resume", run_resource(state="queued"), method="POST", status=202)

    paused = wa("pause", RUN_ID)
    plain = wa("resume", RUN_ID)
    back = wa("resume", RUN_ID, "--from-step", "120", "--lr-scale", "0.5", "--skip-batches", "9")

    assert (paused.stdout, plain.stdout) == (
        f"{RUN_ID} will be paused (now pausing)\n",
        f"{RUN_ID} will go on (now queued)\n",
    )
    assert back.returncode == 0
    assert [body for _, _, body in service.requests] == [
        None,
        None,
        {"from_step": 120, "lr_scale": 0.5, "skip_batches": 9},
    ]


def test_deadlines_are_sent_when_given(wa: Wa, service: Service) -> None:
    """`--queue-deadline` and `--run-deadline` arrive as the submission's deadlines."""
    service.says("/v1/runs", run_resource(state="queued"), method="POST", status=202)

    done = wa("submit", "digits", "--queue-deadline", "60", "--run-deadline", "3600")

    assert done.returncode == 0
    assert service.requests[0][2]["deadlines"] == {"queue_s": 60.0, "run_s": 3600.0}
