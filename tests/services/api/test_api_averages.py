from __future__ import annotations

import hashlib
import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from support.api import ApiRun, app_over
from wa_core import layout
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.base import ByteRange, ObjectInfo


FIELDS = {
    "name",
    "rule",
    "generation",
    "n_averaged",
    "first_step",
    "last_step",
    "behind",
    "coefficients",
    "layers",
    "evaluation",
    "batchnorm",
    "rejected",
    "skipped",
    "weights",
    "published_generation",
    "best_generation",
    "rebuilt",
    "warnings",
}
WEIGHTS = random.Random(0).randbytes(3_000_000)


class CountingStore(MemoryStore):
    """A store whose reads of runs are counted; the probe at the service's start is nobody's request."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.num_listed: dict[str, int] = {}

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read and count."""
        self.calls["get"] += key.startswith(layout.RUNS)
        return super().get(key, range=range)

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """List and count."""
        found = [*super().list(prefix, start_after=start_after, delimiter=delimiter)]
        if prefix.startswith(layout.RUNS):
            self.calls["list"] += 1
            self.num_listed[prefix] = len(found)
        return iter(found)


@pytest.fixture
def run(store: MemoryStore) -> ApiRun:
    """A run of two checkpoints whose average has been published."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.checkpoint(40)
    run.fold(body=WEIGHTS)
    return run


def test_an_average_before_its_first_fold(api: TestClient, store: MemoryStore) -> None:
    """An average is there from the submission on, empty until something is folded."""
    run = ApiRun(store)

    (average,) = api.get(f"/v1/runs/{run.run_id}/averages").json()["data"]

    assert set(average) == FIELDS
    assert (average["name"], average["rule"], average["n_averaged"]) == ("swa", "swa:start_step=20", 0)
    assert (average["generation"], average["weights"], average["coefficients"]) == (None, None, {})
    measured = dict.fromkeys(("raw", "averaged", "before_recalibration", "comparison", "won"))
    assert (average["evaluation"], average["best_generation"]) == (measured, None)


def test_a_published_average(api: TestClient, run: ApiRun) -> None:
    """A published average tells what is in it, how it measures and where its bytes are."""
    average = api.get(f"/v1/runs/{run.run_id}/averages/swa").json()

    assert (average["n_averaged"], average["first_step"], average["last_step"], average["behind"]) == (
        2,
        20,
        40,
        0,
    )
    assert average["coefficients"] == {"20": 0.5, "40": 0.5}
    assert average["evaluation"]["averaged"] == {"step": 40, "loss": 0.5, "accuracy": 0.9}
    assert average["batchnorm"]["status"] == "recalibrated"
    assert average["weights"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert average["weights"]["size_bytes"] == len(WEIGHTS)
    assert api.get(average["weights"]["url"]).content == WEIGHTS


def test_a_newer_fold_keeps_the_published_weights(api: TestClient, run: ApiRun) -> None:
    """While a newer generation is being assessed, the last published weights stay available."""
    run.checkpoint(60)
    behind = api.get(f"/v1/runs/{run.run_id}/averages/swa").json()["behind"]
    run.fold()

    average = api.get(f"/v1/runs/{run.run_id}/averages/swa").json()

    assert behind == 1
    assert (average["generation"], average["published_generation"], average["n_averaged"]) == (2, 1, 3)
    assert average["evaluation"]["averaged"]["step"] == 40
    assert api.get(average["weights"]["url"]).content == WEIGHTS


def test_a_generation_can_be_chosen(api: TestClient, run: ApiRun) -> None:
    """A generation is found by its number, by its last step, or as the best measured."""
    run.checkpoint(60)
    run.fold(body=b"worse", loss=0.9)
    base = f"/v1/runs/{run.run_id}/averages/swa"

    def body(query: str) -> bytes:
        return api.get(f"{base}/weights.safetensors?{query}").content

    assert body("") == body("at=latest") == body("generation=2") == body("step=60") == b"worse"
    assert body("at=best") == body("generation=1") == body("step=40") == WEIGHTS
    assert api.get(f"{base}?at=best").json()["generation"] == 1
    assert api.get(f"{base}?generation=9").json()["code"] == "generation_not_found"
    assert api.get(f"{base}?step=50").json()["code"] == "generation_not_found"


def test_who_won_is_in_the_answer(api: TestClient, store: MemoryStore) -> None:
    """Averaged minus raw, with its interval and a verdict; an average that lost to raw says so."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold()
    run.assess(loss=0.5, raw_loss=0.4)

    evaluation = api.get(f"/v1/runs/{run.run_id}/averages/swa").json()["evaluation"]

    assert evaluation["won"] == evaluation["comparison"]["won"] == "raw"
    assert evaluation["comparison"] == {
        "metric": "loss",
        "difference": pytest.approx(0.1),
        "low": pytest.approx(0.09),
        "high": pytest.approx(0.11),
        "confidence": 0.95,
        "num_samples": 100,
        "unit": "sample",
        "won": "raw",
    }


def test_the_best_generation_is_named_whichever_is_shown(api: TestClient, run: ApiRun) -> None:
    """The best of all is named beside the newest, the best, and an older one that was the best in its day."""
    for loss in (0.3, 0.9):
        run.checkpoint(60)
        run.fold(body=b"weights", loss=loss)
    url = f"/v1/runs/{run.run_id}/averages/swa"

    shown = {query: api.get(f"{url}{query}").json() for query in ("", "?at=best", "?generation=1", "?step=40")}

    assert [one["best_generation"] for one in shown.values()] == [2, 2, 2, 2]
    assert [one["generation"] for one in shown.values()] == [3, 2, 1, 1]
    assert [one["evaluation"]["averaged"]["loss"] for one in shown.values()] == [0.9, 0.3, 0.5, 0.5]


def test_a_generation_that_was_not_assessed_has_no_weights(api: TestClient, run: ApiRun) -> None:
    """It is shown without weights or numbers, its download answers 409; the step's assessed one comes first."""
    run.fold()
    url = f"/v1/runs/{run.run_id}/averages/swa"

    chosen = api.get(f"{url}?generation=2").json()
    download = api.get(f"{url}/weights.safetensors?generation=2")

    assert (chosen["generation"], chosen["weights"], chosen["published_generation"]) == (2, None, None)
    assert chosen["evaluation"]["averaged"] is None
    assert (download.status_code, download.json()["code"]) == (409, "no_average_yet")
    assert api.get(f"{url}?step=40").json()["generation"] == 1


def test_averages_come_in_pages(api: TestClient, store: MemoryStore) -> None:
    """Following `next` gives every average once, as they were asked for."""
    run = ApiRun(store, averages={"c": "swa", "a": "swa", "b": "swa"})

    first = api.get(f"/v1/runs/{run.run_id}/averages?limit=2").json()
    second = api.get(f"/v1/runs/{run.run_id}/averages?limit=2&after={first['next']}").json()

    assert [one["name"] for one in first["data"] + second["data"]] == ["c", "a", "b"]
    assert (first["has_more"], second["has_more"], second["next"]) == (True, False, None)


def test_an_unchanged_average_is_not_sent_again(api: TestClient, store: MemoryStore) -> None:
    """If-None-Match answers 304 for an average, and for all of them, until a checkpoint is folded."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    urls = [f"/v1/runs/{run.run_id}/averages/swa", f"/v1/runs/{run.run_id}/averages"]
    etags = [api.get(url).headers["ETag"] for url in urls]

    def statuses() -> list[int]:
        known = zip(urls, etags, strict=True)
        return [api.get(url, headers={"If-None-Match": etag}).status_code for url, etag in known]

    unchanged = statuses()
    run.fold()

    assert unchanged == [304, 304]
    assert statuses() == [200, 200]


def test_a_failed_assessment_says_so_and_serves_all_the_same(api: TestClient, store: MemoryStore) -> None:
    """Weights that nobody could measure can be downloaded; nothing pretends that they were compared."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=b"unmeasured", loss=None)
    url = f"/v1/runs/{run.run_id}/averages/swa"

    average = api.get(url).json()

    assert average["evaluation"] == dict.fromkeys(("raw", "averaged", "before_recalibration", "comparison", "won"))
    assert (average["best_generation"], average["published_generation"]) == (None, 1)
    assert api.get(f"{url}/weights.safetensors").content == b"unmeasured"


def test_a_look_at_an_average_costs_few_reads() -> None:
    """Known again, it costs two listings however many generations there are; three while one is assessed."""
    counted = CountingStore()
    run = ApiRun(counted).start()
    for step in range(20, 60, 2):
        run.checkpoint(step)
        run.fold(body=b"weights")
    url = f"/v1/runs/{run.run_id}/averages/swa"
    with TestClient(app_over(counted)) as api:

        def reads() -> dict[str, int]:
            counted.calls.clear()
            assert api.get(url).status_code == 200
            return dict(+counted.calls)

        reads()
        assert reads() == {"list": 2}  # the run's log, the generations
        run.checkpoint(60)
        run.fold()
        reads()
        assert reads() == {"list": 3}  # and the assessments
        run.assess()
        assert reads() == {"list": 3, "get": 1}
        assert reads() == {"list": 2}
    # The newest generation, and the folders beside the generations: not all of them each time.
    assert counted.num_listed[layout.generations_prefix(run.run_id, "swa")] == 3
