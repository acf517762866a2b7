"""Whether a run may start."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from services.trainer.admission import Room, Wait, scaling_of
from wa_core.records import AttemptStarted, RunRequest, Scaling


def request(num_workers: int, *, min_workers: int | None = None, use_gpu: bool = False) -> RunRequest:
    """A run with so many workers."""
    scaling = Scaling(num_workers=num_workers, min_workers=min_workers, use_gpu=use_gpu)
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
    room.take(request(3).scaling, owner="a")

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
        room.take(request(1).scaling, owner="alice")

    wait = room.wait_of(request(1), owner="alice")

    assert reason(wait) == "owner_at_limit"
    assert wait is not None
    assert not wait.holds_up_others
    assert room.wait_of(request(1), owner="bob") is None


@pytest.mark.parametrize(
    ("num_cpus", "num_taken", "expected"),
    [(8, 0, 4), (4, 1, 3), (3, 0, 3), (2, 0, 2), (1, 0, "insufficient_resources"), (4, 3, "resources_busy")],
)
def test_f26_an_elastic_run_takes_what_there_is_but_no_fewer_than_it_wants(
    num_cpus: int, num_taken: int, expected: int | str
) -> None:
    """F26: from `min_workers` to `num_workers`, as many as are free; below, it waits, and says for how many."""
    room = Room({"CPU": num_cpus})
    for _ in range(num_taken):
        room.take(Scaling(num_workers=1), owner="b")
    wait = room.wait_of(request(4, min_workers=2), owner="a")

    if isinstance(expected, str):
        assert reason(wait) == expected
        assert "2 workers need 2 CPUs" in (wait.message if wait else "")
    else:
        assert wait is None
        assert room.fit(request(4, min_workers=2).scaling) == Scaling(num_workers=expected)


def test_a_run_that_is_not_elastic_takes_all_its_workers() -> None:
    """Without `min_workers` an attempt has `num_workers`, also where more, or nobody knows how many, would fit."""
    assert Room({"CPU": 8}).fit(request(3).scaling).num_workers == 3
    assert Room({"CPU": 8, "GPU": math.inf}).fit(request(2, min_workers=1, use_gpu=True).scaling).num_workers == 2


def test_what_an_attempt_trains_with_is_in_the_log() -> None:
    """The newest attempt's own number counts; one that an older version wrote has what was asked for."""
    elastic = request(4, min_workers=1)
    old, new = AttemptStarted(runner_id="r"), AttemptStarted(runner_id="r", num_workers=2)

    assert [scaling_of(elastic, log).num_workers for log in ([], [old], [old, new])] == [4, 4, 2]


def test_min_workers_is_at_most_num_workers() -> None:
    """More than all is refused, and the message says what to do."""
    with pytest.raises(ValidationError, match="min_workers 3 is above num_workers 2; raise num_workers"):
        Scaling(num_workers=2, min_workers=3)
