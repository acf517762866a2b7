"""`wa runs --follow`: a table that is kept up to date until Ctrl-C."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from support.command import RUN_ID, run_resource

if TYPE_CHECKING:
    from support.command import Service, Wa


def test_changes_are_printed_until_ctrl_c(wa: Wa, service: Service) -> None:
    """Piped, a run is printed when it is new and when it has changed; Ctrl-C is exit 130 without a traceback."""
    pages = [
        {"data": [run_resource(state=state, step=step)], "has_more": False, "next": None}
        for state, step in (("running", 10), ("running", 10), ("succeeded", 40))
    ]
    service.says("/version", {"version": "0.1.0", "format": 1})
    service.says("/v1/runs", *pages)

    following = wa.start("runs", "--follow")
    assert following.stdout is not None
    lines = [following.stdout.readline().split() for _ in range(2)]
    following.send_signal(signal.SIGINT)
    said = following.communicate(timeout=60)[1]

    assert [line[:2] for line in lines] == [[RUN_ID, "running"], [RUN_ID, "succeeded"]]
    assert (following.returncode, said) == (130, "")


def test_programs_do_not_follow_a_table(wa: Wa, service: Service) -> None:
    """--follow with --json is wrong usage."""
    done = wa("runs", "--follow", "--json")

    assert (done.returncode, service.requests) == (2, [])
    assert "'--follow'" in done.stderr
