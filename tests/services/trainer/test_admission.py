"""Whether a run may start."""

from __future__ import annotations

import pytest

from services.trainer.admission import Room, Wait
from wa_core.records import RunRequest, Scaling


def request(num_workers: int, *, use_gpu: bool = False) -> RunRequest:
    """A run with so many workers."""
    scaling = Scaling(num_workers=num_workers, use_gpu=use_gpu)
    return RunRequest(recipe="services.recipes.digits:Digits", scaling=scaling)


def reason(wait: Wait | None) -> str | None:
    """Its code."""
    return wait.reason if wait else None


@pytest.mark.parametrize(
    ("num_workers", "use_gpu", "expected"),
    [(4, False, None), (5, False, "insufficient_resources"), (1, True, None), (2, True, "insufficient_resources")],
)
def test_f26_a_run_larger_than_the_cluster_waits(num_workers: int, *, use_gpu: bool, expected: str | None) -> None:
    """F26: more processors or GPUs than the whole cluster has is `insufficient_resources`, with both numbers."""
    wait = Room({"CPU": 4, "GPU": 1}).wait_of(request(num_workers, use_gpu=use_gpu), owner="a")

    assert reason(wait) == expected
    if wait is not None:
        assert str(num_workers) in wait.message
        assert not wait.holds_up_others


def test_runs_share_the_cluster() -> None:
    """What others hold is busy, and whoever waits for it is not overtaken."""
    room = Room({"CPU": 4})
    room.take(request(3), owner="a")

    assert room.wait_of(request(1), owner="b") is None
    wait = room.wait_of(request(2), owner="b")
    assert reason(wait) == "resources_busy"
    assert wait is not None
    assert wait.holds_up_others


def test_unknown_resources_admit_nobody() -> None:
    """While the cluster has not answered, a run waits and does not fail."""
    assert reason(Room(None).wait_of(request(1), owner="a")) == "cluster_unknown"


def test_an_owner_trains_so_many_runs_and_no_more() -> None:
    """The quota is each owner's own, and holds nobody else up."""
    room = Room({"CPU": 100}, max_runs_per_owner=2)
    for _ in range(2):
        room.take(request(1), owner="alice")

    wait = room.wait_of(request(1), owner="alice")

    assert reason(wait) == "owner_at_limit"
    assert wait is not None
    assert not wait.holds_up_others
    assert room.wait_of(request(1), owner="bob") is None
