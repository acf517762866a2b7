"""Submissions that the API must refuse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from support.api import submission

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

JSON = {"Content-Type": "application/json"}


def post(api: TestClient, body: bytes | dict[str, object], **headers: str) -> tuple[int, dict[str, Any]]:
    """Submit a body, and check that the service answers with a problem and lives on."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = api.post("/v1/runs", content=content, headers=JSON | headers)
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert {"type", "title", "status", "detail", "code"} <= set(problem)
    assert problem["status"] == answer.status_code
    assert "Traceback" not in answer.text
    assert api.post("/v1/runs", json=submission()).status_code == 202
    return answer.status_code, problem
