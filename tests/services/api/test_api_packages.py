"""Packages over REST: uploaded with a scope of its own, and named by submissions."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from services.api.app import create_app
from support.api import TOKEN, submission
from wa_core.packages import MAX_PACKAGE_BYTES, pack_folder
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

MOONS = pack_folder(Path(__file__).parents[3] / "examples" / "moons")
ZIP = {"Content-Type": "application/zip"}
UNKNOWN = "sha256:" + "0" * 64


def climbing() -> bytes:
    """A zip that wants to leave its folder."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("../escaped.py", "")
    return body.getvalue()


@pytest.fixture
def scoped() -> Iterator[TestClient]:
    """An API with a token for each scope."""
    app = create_app(store=MemoryStore(), token=TOKEN, write_token="write", read_token="look")
    with TestClient(app) as client:
        yield client


def test_a_package_is_uploaded_and_named(api: TestClient, store: MemoryStore) -> None:
    """Its digest is its name, and the run that names it is queued as any other."""
    uploaded = api.post("/v1/packages", content=MOONS, headers=ZIP)
    again = api.post("/v1/packages", content=MOONS, headers=ZIP)

    assert uploaded.status_code == again.status_code == 201
    assert uploaded.json() == again.json()
    assert uploaded.json()["modules"] == ["moons"]
    wanted = submission(
        recipe="moons:Moons", package=uploaded.json()["package"], config={"epochs": 2}, averages=[]
    )
    run = api.post("/v1/runs", json=wanted)
    assert (run.status_code, run.json()["recipe"], run.json()["state"]) == (202, "moons:Moons", "queued")
    assert run.json()["package"] == uploaded.json()["package"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "invalid_package"),  # 37
        (b"PK not really", 422, "invalid_package"),  # 37
        (climbing(), 422, "invalid_package"),  # 37
        (bytes(MAX_PACKAGE_BYTES + 1), 413, "package_too_large"),  # 38
    ],
)
def test_a_bad_package_is_refused(
    api: TestClient, store: MemoryStore, body: bytes, status: int, code: str
) -> None:
    """Bad inputs 37 and 38: no zip, `../` and too many bytes; nothing is kept."""
    answer = api.post("/v1/packages", content=body, headers=ZIP)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert not list(store.list("packages/"))


def test_a_package_that_is_said_to_be_json(api: TestClient) -> None:
    """Bad input 11: the wrong type answers 415 and says which is right."""
    answer = api.post("/v1/packages", content=MOONS, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "application/zip" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("changes", "code", "pointer"),
    [
        ({"package": UNKNOWN}, "package_not_found", "package"),
        ({"recipe": "suns:Moons"}, "unknown_recipe", "recipe"),
        ({"recipe": "moons:Suns"}, "unknown_recipe", "recipe"),
    ],
)
def test_a_submission_that_the_package_cannot_serve(
    api: TestClient, changes: dict[str, object], code: str, pointer: str
) -> None:
    """Bad input 19: a package, module or class that is not there is refused at once, with its place."""
    package = api.post("/v1/packages", content=MOONS, headers=ZIP).json()["package"]
    wanted = submission(recipe="moons:Moons", package=package, config={}) | changes

    answer = api.post("/v1/runs", json=wanted)

    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answer.json()["errors"][0]["pointer"] == pointer


def test_3_sending_code_is_a_scope_of_its_own(scoped: TestClient) -> None:
    """3: the token that writes submits built-in recipes; code, sent or named, wants the full token."""
    full, write, look = ({"Authorization": f"Bearer {token}"} for token in (TOKEN, "write", "look"))
    package = scoped.post("/v1/packages", content=MOONS, headers=ZIP | full).json()["package"]
    wanted = submission(recipe="moons:Moons", package=package, config={})

    refused = [
        scoped.post("/v1/packages", content=MOONS, headers=ZIP | write),
        scoped.post("/v1/packages", content=MOONS, headers=ZIP | look),
        scoped.post("/v1/runs", json=wanted, headers=write),
        scoped.post("/v1/runs", json=submission(), headers=look),
    ]

    assert {(answer.status_code, answer.json()["code"]) for answer in refused} == {(403, "scope_missing")}
    assert scoped.post("/v1/runs", json=submission(), headers=write).status_code == 202
    assert scoped.post("/v1/runs", json=wanted, headers=full).status_code == 202
