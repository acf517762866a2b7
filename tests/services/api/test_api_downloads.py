from __future__ import annotations

import base64
import hashlib
import random
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from support.addressed import AddressedStore
from support.api import ApiRun, app_over
from support.faulty import Fault, FaultyStore

if TYPE_CHECKING:
    from wa_core.store.memory import MemoryStore


WEIGHTS = random.Random(0).randbytes(3_000_000)
ETAG = f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'


@pytest.fixture
def run(store: MemoryStore) -> ApiRun:
    """A run whose published weights are sent in several chunks."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=WEIGHTS)
    return run


@pytest.fixture
def url(run: ApiRun) -> str:
    """Where the run's weights are."""
    return f"/v1/runs/{run.run_id}/averages/swa/weights.safetensors"


def test_the_best_needs_an_evaluation(api: TestClient, store: MemoryStore) -> None:
    """Without a held-out loss there is no best, and the answer says so rather than picking one."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=b"unmeasured", loss=None)

    answer = api.get(f"/v1/runs/{run.run_id}/averages/swa?at=best")

    assert (answer.status_code, answer.json()["code"]) == (409, "no_evaluation")


@pytest.mark.parametrize("query", ["", "?at=best"])
def test_a_download_before_any_fold(api: TestClient, store: MemoryStore, query: str) -> None:
    """Bad input 32: a download before anything is published answers 409 and says how far the run is."""
    run = ApiRun(store).start()
    run.checkpoint(10)
    run.beat(step=12)

    answer = api.get(f"/v1/runs/{run.run_id}/averages/swa/weights.safetensors{query}")

    assert (answer.status_code, answer.json()["code"]) == (409, "no_average_yet")
    assert answer.json()["progress"].keys() >= {"state", "step", "total_steps", "num_checkpoints", "n_averaged"}
    for fact in ("1 checkpoints so far", "from step 20", "at step 12 of 264"):
        assert fact in answer.json()["detail"]


def test_an_unknown_average_or_file(api: TestClient, run: ApiRun) -> None:
    """An average that was not asked for, or a file that was not made, answers 404 with what there is."""
    other = api.get(f"/v1/runs/{run.run_id}/averages/ema")
    pickle = api.get(f"/v1/runs/{run.run_id}/averages/swa/weights.pt")

    assert (other.status_code, other.json()["code"]) == (404, "average_not_found")
    assert (pickle.status_code, pickle.json()["code"]) == (404, "file_not_found")
    assert "weights.safetensors" in pickle.json()["detail"]


def test_a_download_proves_itself(api: TestClient, url: str) -> None:
    """A download carries its length, its digest, a strong ETag and a name to save it under."""
    answer = api.get(url)

    digest = base64.b64encode(hashlib.sha256(WEIGHTS).digest()).decode()
    assert answer.content == WEIGHTS
    assert answer.headers["ETag"] == ETAG
    assert answer.headers["Repr-Digest"] == f"sha-256=:{digest}:"
    assert answer.headers["Content-Length"] == str(len(WEIGHTS))
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Disposition"].startswith('attachment; filename="swa-')


def test_head_says_what_get_would(api: TestClient, url: str) -> None:
    """HEAD carries the very headers of GET, and no byte."""
    head, get = api.head(url), api.get(url)

    assert (head.status_code, head.content) == (200, b"")
    own = {"x-request-id"}
    assert {name: head.headers[name] for name in {*head.headers} - own} == {
        name: get.headers[name] for name in {*get.headers} - own
    }


def test_what_the_caller_has_is_not_sent_again(api: TestClient, url: str) -> None:
    """If-None-Match with the content's ETag answers 304 without a body, and comes before any range."""
    answer = api.get(url, headers={"If-None-Match": ETAG, "Range": "bytes=0-9"})

    assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", ETAG)


def test_a_part_is_sent_alone(api: TestClient, url: str) -> None:
    """A range answers 206 with its bytes, where they lie, and the digest of the whole."""
    answer = api.get(url, headers={"Range": "bytes=1000000-2000000"})

    assert (answer.status_code, answer.content) == (206, WEIGHTS[1_000_000:2_000_001])
    assert answer.headers["Content-Range"] == f"bytes 1000000-2000000/{len(WEIGHTS)}"
    assert answer.headers["Content-Length"] == "1000001"
    assert answer.headers["Repr-Digest"] == api.head(url).headers["Repr-Digest"]


def test_if_range_starts_over_when_the_content_is_another(api: TestClient, url: str) -> None:
    """A range is honoured only while If-Range names the content; otherwise everything is sent."""
    same = api.get(url, headers={"Range": "bytes=5-", "If-Range": ETAG})
    other = api.get(url, headers={"Range": "bytes=5-", "If-Range": '"another"'})

    assert (same.status_code, same.content) == (206, WEIGHTS[5:])
    assert (other.status_code, other.content) == (200, WEIGHTS)


def test_hostile_ranges_get_the_whole_or_a_refusal(api: TestClient, url: str) -> None:
    """Bad input 33: no range makes the service send more than the file once."""
    many = "bytes=" + ",".join(f"{n}-{n}" for n in range(10_000))
    for header, status in [
        (many, 200),
        ("bytes=0-0,-1", 200),
        ("bytes=x", 200),
        (f"bytes={1 << 40}-", 416),
    ]:
        answer = api.get(url, headers={"Range": header})

        assert answer.status_code == status
        assert len(answer.content) <= len(WEIGHTS)
        assert status == 200 or answer.headers["Content-Range"] == f"bytes */{len(WEIGHTS)}"


def test_if_match_guards_against_another_content(api: TestClient, url: str) -> None:
    """If-Match with another ETag answers 412."""
    assert api.get(url, headers={"If-Match": '"another"'}).json()["code"] == "content_changed"
    assert api.head(url, headers={"If-Match": ETAG}).status_code == 200


def test_a_redirect_falls_back_to_serving(api: TestClient, url: str) -> None:
    """A store without addresses of its own is read through the API all the same."""
    assert api.get(f"{url}?redirect=1").content == WEIGHTS


def test_a_redirect_leads_to_the_store() -> None:
    """With redirect the caller is sent to the store's own address, uncached, and told what is there."""
    store = AddressedStore()
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=b"weights")
    url = f"/v1/runs/{run.run_id}/averages/swa/weights.safetensors"
    with TestClient(app_over(store)) as api:
        answer = api.get(f"{url}?redirect=1", follow_redirects=False)
        head = api.head(f"{url}?redirect=1", follow_redirects=False)

    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(b"weights")))
    assert (answer.status_code, answer.headers["Cache-Control"]) == (307, "no-store")
    assert (answer.headers["ETag"], answer.headers["Repr-Digest"]) == (
        head.headers["ETag"],
        head.headers["Repr-Digest"],
    )
    assert answer.headers["Location"].startswith(f"http://127.0.0.1:9/runs/{run.run_id}/averages/swa/blobs/")


def test_a_read_that_breaks_goes_on(store: MemoryStore, url: str) -> None:
    """When the store breaks a read off, the API goes on where it broke, and the caller notices nothing."""
    faulty = FaultyStore(store)
    with TestClient(app_over(faulty)) as api:
        faulty.next_call("stream", Fault.TRUNCATE, Fault.DROP_REQUEST, Fault.TRUNCATE)

        assert api.get(url).content == WEIGHTS


def test_weights_that_a_cleaner_removed(api: TestClient, store: MemoryStore, run: ApiRun, url: str) -> None:
    """A file that is gone answers 404, not half a download."""
    for info in store.list(f"runs/{run.run_id}/averages/swa/blobs/"):
        store.delete(info.key)

    assert api.get(url).json()["code"] == "object_not_found"
