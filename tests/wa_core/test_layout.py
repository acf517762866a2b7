from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wa_core import layout
from wa_core.errors import InvalidInputError

RUN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


def test_keys_are_as_the_format_says() -> None:
    """Every key is spelled as docs/format.md promises; a bucket written today is read tomorrow."""
    run = f"runs/{RUN}"

    assert layout.run_spec(RUN) == f"{run}/run.json"
    assert layout.log_entry(RUN, 7) == f"{run}/log/0000000007.json"
    assert (
        layout.checkpoint_prefix(RUN, attempt=2, step=340, nonce="ab")
        == f"{run}/checkpoints/0002-000000000340-ab/"
    )
    assert layout.generation(RUN, "swa", 3) == f"{run}/averages/swa/00000003.json"
    assert layout.assessment(RUN, "swa", 3) == f"{run}/averages/swa/assessments/00000003.json"
    assert (
        layout.blob(RUN, "swa", nonce="ab", file="model.safetensors")
        == f"{run}/averages/swa/blobs/ab/model.safetensors"
    )
    assert layout.job("landscapes", RUN, "swa", RUN) == f"{run}/averages/swa/landscapes/{RUN}.json"
    assert (
        layout.job_attempt("landscapes", RUN, "swa", RUN, 2)
        == f"{run}/averages/swa/landscapes/{RUN}/attempts/0002.json"
    )
    assert (
        layout.job_progress("landscapes", RUN, "swa", RUN) == f"{run}/averages/swa/landscapes/{RUN}/progress.json"
    )
    assert layout.job_result("landscapes", RUN, "swa", RUN) == f"{run}/averages/swa/landscapes/{RUN}/result.json"
    assert layout.job_marker("landscapes", RUN, "swa", RUN) == f"landscapes/{RUN}-{RUN}-swa.json"
    assert layout.metrics_part(RUN, attempt=1, part=2) == f"{run}/metrics/0001/00000002.jsonl"
    assert layout.logs_part(RUN, attempt=1, rank="driver", part=2) == f"{run}/logs/0001/driver/00000002.txt"
    assert layout.heartbeat(RUN, "runner") == f"{run}/heartbeats/runner.json"
    assert layout.queue_marker(RUN, priority=5) == f"queue/05-{RUN}.json"
    assert layout.active_marker(RUN) == f"active/{RUN}.json"
    assert layout.telling_marker(RUN) == f"telling/{RUN}.json"
    assert layout.run_id_of(layout.telling_marker(RUN)) == RUN
    assert layout.delivery(RUN, webhook=1, event_id="log-0000000002") == f"{run}/webhooks/01/log-0000000002.json"


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_log_keys_sort_as_their_numbers(one: int, other: int) -> None:
    """Listing a log gives its entries in order."""
    assert (layout.log_entry(RUN, one) < layout.log_entry(RUN, other)) == (one < other)


@given(st.integers(1, 99_999_999))
def test_numbers_are_read_back(number: int) -> None:
    """The number that was built into a key is what is parsed from it."""
    for key in (
        layout.log_entry(RUN, number),
        layout.generation(RUN, "swa", number),
        layout.assessment(RUN, "swa", number),
        layout.metrics_part(RUN, attempt=1, part=number),
        layout.logs_part(RUN, attempt=1, rank=0, part=number),
    ):
        assert layout.number_of(key) == number


@pytest.mark.parametrize(
    "key", [f"runs/{RUN}/averages/swa/blobs/", f"runs/{RUN}/run.json", "x.json", "1.json.tmp", "1", ""]
)
def test_other_keys_have_no_number(key: str) -> None:
    """A key that is no numbered record has no number."""
    assert layout.number_of(key) is None


def test_run_ids_sort_by_time() -> None:
    """Run ids are well-formed, different, and sort by when they were made."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    ids = [layout.new_run_id(start + timedelta(milliseconds=offset)) for offset in range(50)]

    assert ids == sorted(set(ids))
    assert all(layout.is_run_id(run_id) for run_id in ids)


@pytest.mark.parametrize(
    "bad", ["", "../x", RUN.lower(), RUN[:-1], f"{RUN}0", f"{RUN}\n", "8" * 26, "%2e%2e", "a\0b", "I" * 26]
)
def test_what_is_no_run_id_builds_no_key(bad: str) -> None:
    """Text that is no run id, such as a path, never becomes part of a key."""
    assert not layout.is_run_id(bad)
    with pytest.raises(InvalidInputError, match="is not a run id"):
        layout.log_entry(bad, 1)


@pytest.mark.parametrize(
    "key", [layout.run_spec(RUN), layout.queue_marker(RUN, priority=50), layout.active_marker(RUN), f"runs/{RUN}/"]
)
def test_run_ids_are_read_from_keys(key: str) -> None:
    """Keys and common prefixes of runs and markers give their run id."""
    assert layout.run_id_of(key) == RUN


@pytest.mark.parametrize("key", ["runs/", "runs/x/run.json", f"queue/{RUN}.json", f"probe/{RUN}/"])
def test_other_keys_have_no_run_id(key: str) -> None:
    """Keys that belong to no run give none."""
    assert layout.run_id_of(key) is None


def test_nonces_differ() -> None:
    """Two writers that want a key of their own do not get the same."""
    assert len({layout.new_nonce() for _ in range(100)}) == 100


def test_landscape_keys_are_read_back() -> None:
    """A marker says whose landscape it is, and a listing tells requests from results and from all else."""
    marker = layout.job_marker("landscapes", RUN, "my-ema-2", RUN)

    assert layout.job_of_marker("landscapes", marker) == (RUN, "my-ema-2", RUN)
    assert layout.job_of_marker("landscapes", layout.active_marker(RUN)) is None
    assert layout.job_id_of("landscapes", layout.job("landscapes", RUN, "swa", RUN)) == (RUN, False)
    assert layout.job_id_of("landscapes", layout.job_result("landscapes", RUN, "swa", RUN)) == (RUN, True)
    for key in (
        layout.job_progress("landscapes", RUN, "swa", RUN),
        layout.job_attempt("landscapes", RUN, "swa", RUN, 1),
    ):
        assert layout.job_id_of("landscapes", key) is None
