"""Answers as objects: typed, frozen, and still the JSON that the service sent."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from services.client import ApiError, Client
from services.client.answers import Average, Page, Run
from support.api import ApiRun, serving
from support.command import average_resource, run_resource
from support.cutting import cutting
from wa_core.records import Failed
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE = """
from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path
from typing import assert_type

from services.client import AsyncClient, Client
from services.client.answers import Average, Event, Page, Run

with Client() as client:
    run = client.submit({"recipe": "services.recipes.digits:Digits"}, key="mine")
    assert_type(run, Run)
    assert_type(run.created_at, datetime)
    assert_type(run.reason.code if run.reason else None, str | None)
    assert_type(client.runs(state="running", limit=3), Page[Run])
    assert_type([each.step for each in client.all_runs(label="team:vision")], list[int])
    assert_type(client.averages(run.run_id), list[Average])
    assert_type(client.average(run.run_id, "swa", at="best").evaluation.won, str | None)
    assert_type(client.download(run.run_id, "swa", "swa.safetensors"), Path)
    for event in client.follow_events(run.run_id):
        assert_type(event, Event)

    client.runs(states="running")  # error: no such parameter
    client.run(7)  # error: not an id
    run.step = 3  # error: frozen


async def main() -> None:
    async with AsyncClient() as client:
        assert_type(await client.run("RUN", wait_s=30), Run)
        async for run in client.watch("RUN"):
            assert_type(run, Run)
        assert_type(await client.download("RUN", "swa", Path("x"), at=120), Path)
        client.run(7)  # error: not an id


asyncio.run(main())
"""


def test_an_answer_is_an_object_and_still_the_json() -> None:
    """Fields have types, what is inside too; and the mapping is what the service sent, bit for bit."""
    said = run_resource(reason={"code": "user_code", "message": "ValueError"}, new_in_2027={"a": 1})

    run = Run.model_validate(said)

    assert run.reason is not None
    assert (run.reason.code, run.created_at.year, run.has_ended) == ("user_code", 2026, True)
    assert (run["reason"]["code"], run.get("nothing"), "step" in run) == ("user_code", None, True)
    assert dict(run) == said == run
    assert run["new_in_2027"] == {"a": 1}
    assert json.loads(json.dumps({**run})) == said


def test_an_answer_cannot_be_changed() -> None:
    """Answers are what was true at a moment: frozen."""
    run = Run.model_validate(run_resource())

    with pytest.raises(ValidationError):
        run.step = 3  # type: ignore[misc]


def test_answers_hold_answers() -> None:
    """Pages and averages give objects all the way down."""
    page = Page[Run].model_validate({"data": [run_resource()], "has_more": True, "next": "x"})
    average = Average.model_validate(average_resource(coefficients={"20": 0.5, "40": 0.5}))

    assert page.data[0].state == "succeeded"
    assert average.evaluation.comparison is not None
    assert (average.evaluation.comparison.won, average.coefficients) == ("averaged", {20: 0.5, 40: 0.5})


def test_an_older_or_newer_service_is_understood() -> None:
    """What a service does not say has a value that means so; states that are new to this client are kept."""
    keys = {"run_id", "created_at", "updated_at"}
    least = {key: value for key, value in run_resource().items() if key in keys}

    run = Run.model_validate(least | {"state": "hibernating"})

    assert (run.state, run.has_ended, run.eta_s, run.labels) == ("hibernating", False, None, {})


def test_an_answer_that_makes_no_sense_is_an_api_error() -> None:
    """Another service's JSON is told as such, with the field that is missing, and not by a KeyError later."""
    with (
        cutting(b'{"what": "is this"}') as server,
        Client(f"http://127.0.0.1:{server.server_address[1]}") as client,
        pytest.raises(ApiError, match="run_id") as refused,
    ):
        client.run("RUN")

    assert refused.value.code == "unexpected_answer"


def test_every_run_is_listed_over_pages() -> None:
    """`all_runs` asks for page after page, and only for those that are wanted."""
    store = MemoryStore()
    run_ids = [ApiRun(store).run_id for _ in range(5)]
    with serving(store) as url, Client(url) as client:
        everything = [run.run_id for run in client.all_runs(page_size=2)]
        newest = next(client.all_runs(page_size=2)).run_id

    assert everything == run_ids[::-1]
    assert newest == run_ids[-1]


def test_a_feed_goes_on_where_it_was() -> None:
    """Following events from a cursor gives what came after it, each once, and ends with the run."""
    run = ApiRun(store := MemoryStore()).start()
    run.checkpoint(20)
    with serving(store) as url, Client(url) as client:
        seen = []
        for event in client.follow_events(run.run_id, after=1, poll_s=0.01):
            seen.append((event.seq, event.kind))
            if event.kind == "checkpoint" and event["step"] == 20:
                run.checkpoint(40)
                run.log.append(Failed(reason="user_code"))

    assert seen == [(2, "attempt_started"), (3, "checkpoint"), (4, "checkpoint"), (5, "failed")]


def test_the_public_types_hold(tmp_path: Path) -> None:
    """A program written against the client type-checks, and its mistakes are found before it runs."""
    sample = tmp_path / "sample.py"
    sample.write_text(SAMPLE)

    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(sample)],
        capture_output=True,
        text=True,
        check=False,
    )

    wrong = [number for number, line in enumerate(SAMPLE.splitlines(), 1) if "# error:" in line]
    said = [int(line.split(":")[1]) for line in checked.stdout.splitlines() if ": error:" in line]
    assert said == wrong, checked.stdout
