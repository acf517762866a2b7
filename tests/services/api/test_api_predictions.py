"""What the API says of predictions by itself: without a predictor, and before one would be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from services.api.answers.predictions import Predictor
from services.api.app import create_app
from support.api import ApiRun, serving

if TYPE_CHECKING:
    from wa_core.store.memory import MemoryStore


@pytest.fixture
def url(store: MemoryStore) -> str:
    """Where a published average is asked."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=b"weights")
    return f"/v1/runs/{run.run_id}/averages/swa:predict"


def test_without_a_predictor_it_says_how_to_start_one(api: TestClient, url: str) -> None:
    """503 `predictor_unavailable`, with the command and the setting."""
    answer = api.post(url, json={"instances": [1]})

    assert (answer.status_code, answer.json()["code"]) == (503, "predictor_unavailable")
    assert "Retry-After" in answer.headers
    assert "python -m services.predictor" in answer.json()["detail"]
    assert "WA_PREDICTOR_URL" in answer.json()["detail"]


@pytest.mark.parametrize("elsewhere", ["http://127.0.0.1:9", "http://no such host", "nonsense"])
def test_a_predictor_that_is_not_there_is_unavailable(store: MemoryStore, url: str, elsewhere: str) -> None:
    """Nobody there, or an address that is none: 503, and the API goes on."""
    with TestClient(create_app(store=store, predictor=Predictor(elsewhere))) as api:
        answers = [api.post(url, json={"instances": [1]}) for _ in range(2)]

    assert [(one.status_code, one.json()["code"]) for one in answers] == [(503, "predictor_unavailable")] * 2


def test_something_else_in_its_place_is_not_believed(store: MemoryStore, url: str) -> None:
    """What answers as the predictor and is none is 503; none of what it says comes out."""
    with serving(store) as another, TestClient(create_app(store=store, predictor=Predictor(another))) as api:
        answer = api.post(url, json={"instances": [1]})

    assert (answer.status_code, answer.json()["code"]) == (503, "predictor_unavailable")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "body_not_json"),
        (b'{"instances": []}', 422, "invalid_request"),
        (b'{"instances": {}}', 422, "invalid_request"),
        (b"{}", 422, "invalid_request"),
        (b'{"inputs": [1]}', 422, "invalid_request"),
        (b'{"instances": [NaN]}', 422, "invalid_number"),
        (b'{"instances": [1e999]}', 422, "invalid_number"),
        (b'{"instances": [' + b"1," * 256 + b"1]}", 422, "invalid_request"),
        (b'{"instances": ["' + b"x" * (1 << 20) + b'"]}', 413, "body_too_large"),
        (b'{"instances": [' + b"[" * 100_000, 400, "body_not_json"),
    ],
)
def test_a_body_that_is_none_never_gets_to_the_predictor(
    api: TestClient, url: str, body: bytes, status: int, code: str
) -> None:
    """Bad inputs 6, 7, 10, 12-14: refused here, with the code and the place."""
    answer = api.post(url, content=body, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) in {(status, code), (status, "body_too_deep")}
    if code == "invalid_request":
        assert answer.json()["errors"][0]["pointer"] in {"instances", "inputs"}


def test_what_there_is_not_cannot_be_asked(api: TestClient, store: MemoryStore, url: str) -> None:
    """Bad inputs 4, 32: unknown runs, averages and generations are 404, an average without weights is 409."""
    waiting = ApiRun(store).start()
    urls = {
        "/v1/runs/01J0000000000000000000000A/averages/swa:predict": (404, "run_not_found"),
        url.replace("swa:", "ema:"): (404, "average_not_found"),
        f"{url}?generation=9": (404, "generation_not_found"),
        f"{url}?step=30": (404, "generation_not_found"),
        f"/v1/runs/{waiting.run_id}/averages/swa:predict": (409, "no_average_yet"),
    }
    for where, expected in urls.items():
        answer = api.post(where, json={"instances": [1]})
        assert (answer.status_code, answer.json()["code"]) == expected, where
