"""Raw weights over REST: those of checkpoints, to compare averages with."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from support.addressed import AddressedStore
from support.api import ApiRun, app_over
from wa_core import layout

if TYPE_CHECKING:
    import httpx2

    from wa_core.store.memory import MemoryStore

#: What `ApiRun.checkpoint` writes as the weights of step 40.
BODY = b"checkpoint 40"


@pytest.fixture
def run(store: MemoryStore) -> ApiRun:
    """A run of two checkpoints."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.checkpoint(40)
    return run


def raw(api: TestClient, run: ApiRun, step: int | str, **headers: str) -> httpx2.Response:
    """The answer to who asks for the raw weights of a step."""
    return api.get(f"/v1/runs/{run.run_id}/checkpoints/{step}/weights.safetensors", headers=headers)


def test_a_checkpoint_is_served_and_proves_itself(api: TestClient, run: ApiRun) -> None:
    """Its bytes, their digest, and a name that says what they are; ranges work, what one has is not sent."""
    whole = raw(api, run, 40)
    etag = f'"{hashlib.sha256(BODY).hexdigest()}"'

    assert (whole.status_code, whole.content, whole.headers["ETag"]) == (200, BODY, etag)
    assert f'filename="{run.run_id}-40.raw.safetensors"' in whole.headers["Content-Disposition"]
    assert "sha-256=:" in whole.headers["Repr-Digest"]
    part = raw(api, run, 40, **{"Range": "bytes=11-", "If-Range": etag})
    assert (part.status_code, part.content) == (206, b"40")
    assert raw(api, run, 40, **{"If-None-Match": etag}).status_code == 304
    assert api.head(str(whole.url)).headers["Content-Length"] == str(len(BODY))


def test_the_newest_is_the_newest_that_counts(api: TestClient, run: ApiRun) -> None:
    """`latest` follows the run, and after a rewind never leads to an abandoned branch."""
    assert raw(api, run, "latest").content == BODY

    run.start(resumed_from=run.log.lineage[0].seq)

    assert raw(api, run, "latest").content == b"checkpoint 20"
    abandoned = raw(api, run, 40)
    assert (abandoned.status_code, abandoned.json()["code"]) == (404, "checkpoint_not_found")
    assert "its newest is of step 20" in abandoned.json()["detail"]


def test_what_is_not_there_is_404(api: TestClient, run: ApiRun, store: MemoryStore) -> None:
    """Unknown runs and steps, a run without checkpoints, and what retention has removed, each with its code."""
    key = run.log.lineage[0].files[layout.MODEL_FILE].key
    store.delete(key)
    empty, unknown = ApiRun(store).start(), ApiRun(store)
    unknown.run_id = "01J0000000000000000000000A"

    answers = {
        "checkpoint_not_found": [raw(api, run, 30), raw(api, empty, "latest"), raw(api, empty, 0)],
        "object_not_found": [raw(api, run, 20)],
        "run_not_found": [raw(api, unknown, "latest")],
    }
    for code, found in answers.items():
        assert [(one.status_code, one.json()["code"]) for one in found] == [(404, code)] * len(found)


@pytest.mark.parametrize("step", ["-1", "best", "1e3", "٣", "1" * 13, "%00"])
def test_what_is_no_step_is_refused(api: TestClient, run: ApiRun, step: str) -> None:
    """Bad input 12: only digits and `latest` name a checkpoint; 422, or 404 where it is no such path."""
    assert raw(api, run, step).status_code == 422


def test_a_redirect_leads_to_the_store() -> None:
    """With redirect=1 the caller goes to the store itself, where it has addresses."""
    run = ApiRun(AddressedStore()).start()
    run.checkpoint(40)

    with TestClient(app_over(run.store)) as api:
        url = f"/v1/runs/{run.run_id}/checkpoints/latest/weights.safetensors?redirect=1"
        answer = api.get(url, follow_redirects=False)

    assert answer.status_code == 307
    assert run.log.lineage[0].files[layout.MODEL_FILE].key in answer.headers["Location"]
