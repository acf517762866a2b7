"""What makes the command pleasant: suggestions, completion, filters, the page."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest
import typer

from services.cli.arguments import parse_since
from services.cli.open import has_browser
from support.command import RUN_ID, average_resource, run_resource

if TYPE_CHECKING:
    from support.command import Service, Wa

RUN = f"/v1/runs/{RUN_ID}"


def completed(wa: Wa, *words: str, for_shell: str = "bash") -> list[str]:
    """What a shell is offered after these words; the last one is unfinished."""
    variables = {
        "_WA_COMPLETE": f"complete_{for_shell}",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": " ".join(words),
    }
    wa.environment |= variables
    done = wa()
    for name in variables:
        del wa.environment[name]
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["runs", "--stat", "running"], "'--state'"),
        (["submit", "digits", "--averge", "swa"], "'--average'"),
        (["download", RUN_ID, "--outptu", "x"], "'--output'"),
    ],
)
def test_77_an_unknown_option_is_exit_2_with_a_suggestion(lonely_wa: Wa, arguments: list[str], meant: str) -> None:
    """A typing error in an option gets the one that was meant."""
    done = lonely_wa(*arguments)

    assert done.returncode == 2
    assert f"Did you mean {meant}?" in " ".join(done.stderr.split())


def test_an_unknown_run_gets_the_one_that_was_meant(wa: Wa, service: Service) -> None:
    """The beginning of an id, or one with a slip, is answered with the run it may be."""
    service.says("/v1/runs", {"data": [run_resource()], "has_more": False, "next": None})

    begun, slipped, far = wa("show", RUN_ID[:8]), wa("cancel", RUN_ID[:-2] + "XX"), wa("show", "zzz")

    assert [done.returncode for done in (begun, slipped, far)] == [1, 1, 1]
    assert f"Did you mean '{RUN_ID}'?" in begun.stderr
    assert f"Did you mean '{RUN_ID}'?" in slipped.stderr
    assert "`wa runs` lists the runs" in far.stderr


def test_an_unknown_average_gets_the_one_that_was_meant(wa: Wa, service: Service) -> None:
    """A slip in an average's name gets the name; else those that there are."""
    missing = {"detail": "no such average", "code": "average_not_found"}
    service.says(f"{RUN}/averages", {"data": [average_resource(name="window-8")]})
    for name in ("windw-8", "zzz"):
        service.says(f"{RUN}/averages/{name}/weights.safetensors", missing, status=404)

    slipped, far = (wa("download", RUN_ID, "--average", name, "-o", "x") for name in ("windw-8", "zzz"))

    assert "Did you mean 'window-8'?" in slipped.stderr
    assert "it has: window-8" in far.stderr


def test_commands_options_runs_and_averages_are_completed(wa: Wa, service: Service) -> None:
    """TAB knows commands and options, and asks the service for the ids of runs and the names of averages."""
    service.says("/v1/runs", {"data": [run_resource()], "has_more": False, "next": None})
    service.says(f"{RUN}/averages", {"data": [average_resource(), average_resource(name="ema")]})

    assert sorted(completed(wa, "wa", "av")) == ["average", "averages"]
    assert "--state" in completed(wa, "wa", "runs", "--st")
    assert completed(wa, "wa", "show", "01") == [RUN_ID]
    assert completed(wa, "wa", "show", "02") == []
    assert completed(wa, "wa", "verify", RUN_ID, "s") == ["swa"]
    assert "ema" in completed(wa, "wa", "download", RUN_ID, "--average", "")
    assert any(RUN_ID in word for word in completed(wa, "wa", "show", "01", for_shell="zsh"))


def test_completion_is_silent_without_a_service(lonely_wa: Wa) -> None:
    """A shell that waits for an offer never gets an error."""
    assert completed(lonely_wa, "wa", "show", "01") == []


def test_completion_can_be_installed(lonely_wa: Wa) -> None:
    """`--show-completion` prints what a shell reads; `--install-completion` is in the help."""
    done = lonely_wa("--help")

    assert "--install-completion" in done.stdout


def test_runs_are_filtered_by_the_service(wa: Wa, service: Service) -> None:
    """State, label, owner and age arrive as the service's parameters; many runs are read page by page."""
    first = {"data": [run_resource()] * 200, "has_more": True, "next": RUN_ID}
    service.says("/v1/runs", first, {"data": [run_resource()] * 50, "has_more": True, "next": RUN_ID})

    done = wa(
        *("runs", "--state", "running", "--label", "team=vision", "--owner", "ann", "--since", "2026-11-01"),
        *("--limit", "250", "--json"),
    )

    asked = [parse_qs(urlsplit(path).query) for _, path, _ in service.requests]
    assert len(json.loads(done.stdout)["data"]) == 250
    assert [(each["limit"], each.get("after")) for each in asked] == [(["200"], None), (["50"], [RUN_ID])]
    assert asked[0]["state"] == ["running"]
    assert asked[0]["label"] == ["team:vision"]
    assert asked[0]["owner"] == ["ann"]
    assert ["2026-11-01T00:00:00+00:00"] in asked[0].values()


def test_ages_and_dates() -> None:
    """Ages count back from now; a date without a zone is UTC; anything else names the option."""
    now = datetime(2026, 11, 25, 12, tzinfo=UTC)

    assert parse_since("90m", now=now) == "2026-11-25T10:30:00+00:00"
    assert parse_since("7d", now=now) == "2026-11-18T12:00:00+00:00"
    assert parse_since("2026-11-01T10:00:00+02:00", now=now) == "2026-11-01T10:00:00+02:00"
    for wrong in ("soon", "999999w", "-1d"):
        with pytest.raises(typer.BadParameter, match=re.escape(wrong)):
            parse_since(wrong, now=now)


def test_open_prints_the_address_where_no_browser_is(wa: Wa, service: Service, lonely_wa: Wa) -> None:
    """`wa open` looks whether the run is there, and prints the page's address."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        wa.environment.pop(name, None)
    service.says("/version", {"version": "1", "format": 1})
    service.says(RUN, run_resource())

    assert wa("open").stdout == f"{service.url}/\n"
    assert wa("open", RUN_ID).stdout == f"{service.url}/runs/{RUN_ID}\n"
    assert json.loads(wa("open", RUN_ID, "--json").stdout) == {"url": f"{service.url}/runs/{RUN_ID}"}
    assert wa("open", "nothing").returncode == 1
    assert lonely_wa("open").returncode == 3


def test_open_opens_a_browser_where_one_is(wa: Wa, service: Service) -> None:
    """The browser that the environment names gets the page's address."""
    browser = wa.folder / "browser"
    browser.write_text('#!/bin/sh\necho "$1" > opened\n')
    browser.chmod(0o755)
    wa.environment["BROWSER"] = str(browser)
    service.says("/version", {"version": "1", "format": 1})

    done = wa("open")

    assert done.returncode == 0
    assert (wa.folder / "opened").read_text() == f"{service.url}/\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there always is one")
def test_a_browser_needs_a_screen() -> None:
    """Without a screen nothing is opened: a browser of text would take the terminal away."""
    assert not has_browser({})
    assert has_browser({"DISPLAY": ":0"})


def test_80_ctrl_c_while_following_a_feed_says_that_the_run_goes_on(wa: Wa, service: Service) -> None:
    """Ctrl-C ends `events -f`, not the run, and says so: exit 130."""
    event = {"seq": 1, "at": "2026-11-22T08:00:00Z", "kind": "submitted", "state": "queued", "attempt": 0}
    service.says(RUN, run_resource(state="running"))
    service.says(f"{RUN}/events", {"data": [event], "has_more": False, "next": 1})

    following = wa.start("events", RUN_ID, "--follow", "--json")
    assert following.stdout is not None
    try:
        assert json.loads(following.stdout.readline())["kind"] == "submitted"
        following.send_signal(2)
        _, said = following.communicate(timeout=60)
    finally:
        following.kill()
        following.communicate()

    assert following.returncode == 130
    assert f"run {RUN_ID} goes on" in said


def test_a_reader_that_goes_away_is_no_error_to_talk_about(wa: Wa, service: Service) -> None:
    """`wa logs RUN | head -1` ends in silence."""
    lines = [{"attempt": 1, "rank": "0", "text": "x" * 1000} for _ in range(2000)]
    service.says(f"{RUN}/logs", {"data": lines, "has_more": False, "next": "1"})

    with wa.start("logs", RUN_ID) as reading:
        assert reading.stdout is not None
        assert reading.stderr is not None
        reading.stdout.readline()
        reading.stdout.close()
        assert reading.stderr.read() == ""


def test_bench_measures_what_is_there(lonely_wa: Wa) -> None:
    """Files are averaged anywhere; bucket and service that are not there are left out, and that is said."""
    done = lonely_wa("bench", "--size", "1", "--json")

    assert done.returncode == 0
    assert [figure["unit"] for figure in json.loads(done.stdout)["figures"]] == ["s", "MiB/s"]
    assert "the bucket is left out" in done.stderr
    assert "the service is left out" in done.stderr


def test_env_says_that_nothing_runs(lonely_wa: Wa) -> None:
    """Where no stack runs there is nothing to export: exit 3, one line with what to do, and nothing on stdout."""
    done = lonely_wa("env")

    assert (done.returncode, done.stdout) == (3, "")
    assert "wa up" in done.stderr
