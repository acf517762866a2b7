from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.api import ApiRun, submission
from support.problems import post

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore


UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


def test_an_unknown_run_is_not_found(api: TestClient) -> None:
    """Bad input 4: every route of a run that does not exist answers 404 `run_not_found`."""
    paths = ["", "/events", "/logs", "/metrics", "/checkpoints", "/averages", "/averages/swa"]

    answers = [api.get(f"/v1/runs/{UNKNOWN}{path}") for path in [*paths, "/averages/swa/weights.safetensors"]]

    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(404, "run_not_found")}
    assert api.post(f"/v1/runs/{UNKNOWN}:cancel").status_code == 404


@pytest.mark.parametrize("run_id", ["../x", "%2e%2e", "%2e%2e%2fqueue", "a%00b", "x" * 10_000, "%ff%fe", "01arz"])
def test_an_impossible_run_id_is_not_found(api: TestClient, run_id: str) -> None:
    """Bad input 5: an id that no run can have answers 404 or 422 and reaches no key."""
    for path in (f"/v1/runs/{run_id}", f"/v1/runs/{run_id}/averages/swa", f"/v1/runs/{run_id}/logs"):
        answer = api.get(path)

        assert answer.status_code in {404, 422}
        assert len(answer.content) < 1000


def test_an_impossible_average_or_rank_is_refused(api: TestClient, store: MemoryStore) -> None:
    """Bad input 5: names that climb out of their folder are refused too."""
    run = ApiRun(store)

    assert api.get(f"/v1/runs/{run.run_id}/averages/%2e%2e").status_code == 404
    assert api.get(f"/v1/runs/{run.run_id}/logs?rank=../../x").status_code == 422


@pytest.mark.parametrize("body", [b"", b"{", b"not json", b'{"a": 1,}', b'{"recipe": "\\ud800"}'])
def test_a_body_that_is_not_json(api: TestClient, body: bytes) -> None:
    """Bad input 6: a body that is not JSON answers 400 and says where."""
    status, problem = post(api, body)

    assert (status, problem["code"]) == (400, "body_not_json")


def test_a_body_over_the_limit(api: TestClient) -> None:
    """Bad input 7: a body of more than 1 MiB answers 413."""
    status, problem = post(api, b'{"recipe": "' + b"x" * (1 << 20) + b'"}')

    assert (status, problem["code"]) == (413, "body_too_large")


def test_a_nest_of_brackets(api: TestClient) -> None:
    """Bad input 10: 100,000 open brackets answer 400."""
    for body in (b"[" * 100_000, b"[" * 70 + b"]" * 70, b'{"a":' * 100_000):
        status, problem = post(api, body)

        assert status == 400
        assert problem["code"] in {"body_too_deep", "body_not_json"}


def test_a_wrong_content_type(api: TestClient) -> None:
    """Bad input 11: anything but JSON answers 415."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
        status, problem = post(api, submission(), **{"Content-Type": content_type})

        assert (status, problem["code"]) == (415, "unsupported_media_type")


def test_a_query_of_nothing_but_faults_is_answered_in_short(api: TestClient) -> None:
    """Bad input 34: as many wrong filters as a query holds are not all listed."""
    answer = api.get("/v1/runs?" + "state=x&" * 3000)

    assert (answer.status_code, len(answer.json()["errors"])) == (422, 50)


def test_duplicate_keys(api: TestClient) -> None:
    """Bad input 16: a key that appears twice answers 422, at any depth."""
    for body in (b'{"seed": 1, "seed": 2}', b'{"config": {"lr": 1, "lr": 2}}', b'{"\\ud800": 1, "\\ud800": 2}'):
        status, problem = post(api, body)

        assert (status, problem["code"]) == (422, "duplicate_key")


def test_bad_utf8(api: TestClient) -> None:
    """Bad input 17: bytes that are not UTF-8 answer 400."""
    status, problem = post(api, b'{"recipe": "\xff\xfe"}')

    assert (status, problem["code"]) == (400, "body_not_utf8")


@pytest.mark.parametrize(
    "query",
    [
        "limit=1000000000",
        "limit=0",
        "limit=x",
        "after=nonsense",
        "after=",
        "state=nonsense",
        "state=queued&state=nonsense",
        "label=nocolon",
        "owner=../x",
        "created_after=yesterday",
        "created_after=2026-11-25",
        "created_before=1764028800",
        "created_before=2026-11-25T08:30:00",
        "created_before=2026-13-25T08:30:00Z",
    ],
)
def test_bad_pages_of_runs(api: TestClient, query: str) -> None:
    """Bad input 34: an impossible page size, cursor or filter answers 422."""
    answer = api.get(f"/v1/runs?{query}")

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    "path",
    [
        "events?after=-1",
        "events?after=99999999999999999999",
        "events?limit=1000000000",
        "logs?after=1-2",
        "logs?after=../../x",
        "logs?attempt=0",
        "metrics?after=a-b-c",
        "averages?limit=0",
        "averages?after=swa",
        "checkpoints?limit=1000000000",
        "checkpoints?after=-1",
        "logs?follow=1&after=x",
        "averages/swa?generation=0",
        "averages/swa?step=-1",
        "averages/swa?at=worst",
        "averages/swa?at=best&step=3",
    ],
)
def test_bad_pages_of_a_run(api: TestClient, store: MemoryStore, path: str) -> None:
    """Bad input 34: impossible cursors and choices below a run answer 422."""
    answer = api.get(f"/v1/runs/{ApiRun(store).run_id}/{path}")

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_a_wrong_method_names_the_right_ones(api: TestClient) -> None:
    """Bad input 35: a method that a path does not take answers 405 with all that it does take."""
    runs = api.put("/v1/runs")
    weights = api.delete(f"/v1/runs/{UNKNOWN}/averages/swa/weights.safetensors")

    assert (runs.status_code, runs.json()["code"], runs.headers["Allow"]) == (
        405,
        "method_not_allowed",
        "GET, POST",
    )
    assert (weights.status_code, weights.headers["Allow"]) == (405, "GET, HEAD")


def test_a_wrong_method_on_a_file_of_the_page(api: TestClient) -> None:
    """Bad input 35: the page's files say too that they are there to be read."""
    answer = api.put("/static/page.css")

    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_an_unknown_path_is_a_problem_too(api: TestClient) -> None:
    """A path that does not exist answers 404 in the same form as every other refusal."""
    answer = api.get("/v1/nothing")

    assert (answer.status_code, answer.json()["code"]) == (404, "route_not_found")
    assert answer.headers["Content-Type"] == "application/problem+json"
