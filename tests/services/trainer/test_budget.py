"""What follows a failed attempt, and how much time a run has used."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from services.trainer.budget import MAX_LOST, final_failure, spent_s
from wa_core.catalog.history import state_after
from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    CheckpointCommitted,
    Deadlines,
    LogEntry,
    Paused,
    PauseRequested,
    ResumeRequested,
    RunRequest,
    RunState,
    Submitted,
)

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
REQUEST = RunRequest(recipe="services.recipes.digits:Digits", max_failures=1)
STARTED = AttemptStarted(runner_id="test")
SAVED = CheckpointCommitted(step=1, files={}, spec_digest="0" * 64)


def story(*entries: LogEntry, every_s: float = 10.0) -> list[LogEntry]:
    """A log of these entries, one every few seconds."""
    told: list[LogEntry] = []
    state = RunState.QUEUED
    for number, entry in enumerate((Submitted(), *entries)):
        state = state_after(state, entry)
        at = BEGIN + timedelta(seconds=number * every_s)
        told.append(entry.model_copy(update={"seq": number + 1, "state": state, "at": at}))
    return told


def failed(reason: str) -> AttemptFailed:
    """An attempt's end."""
    return AttemptFailed(reason=reason)


def verdict(*entries: LogEntry, request: RunRequest = REQUEST) -> str | None:
    """The reason with which the run fails, if it does."""
    told = story(*entries)
    final = final_failure(told, request, now=told[-1].at or BEGIN)
    return final.reason if final else None


def test_one_failure_more_than_allowed_ends_the_run() -> None:
    """`max_failures` counts every failure of the run's own, and the last one's reason is given."""
    assert verdict(STARTED, failed("user_code")) is None
    assert verdict(STARTED, failed("user_code"), STARTED, SAVED, failed("stalled")) == "stalled"


@pytest.mark.parametrize("reason", ["invalid_config", "unknown_recipe", "incompatible"])
def test_what_could_only_fail_again_is_not_tried_again(reason: str) -> None:
    """A hopeless failure ends the run whatever `max_failures` says."""
    assert verdict(STARTED, failed(reason), request=REQUEST.model_copy(update={"max_failures": 9})) == reason


def test_stopped_runners_and_damaged_checkpoints_cost_nothing() -> None:
    """F16: what is not the run's fault is not counted, however often it happens."""
    damaged = (AttemptStarted(runner_id="test", resumed_from=3), failed("corrupt"))

    assert verdict(*(STARTED, failed("runner_stopped")) * 20) is None
    assert verdict(STARTED, SAVED, failed("worker_died"), *damaged * 5) is None
    assert verdict(*(STARTED, failed("corrupt")) * 2) == "corrupt"  # nothing to grow from: it is something else


def test_f16_a_run_that_ends_its_runners_is_ended() -> None:
    """F16: runners lost in a row without a checkpoint end the run; with one in between they never do."""
    lost = (STARTED, failed("runner_lost"))
    stopped = (STARTED, failed("runner_stopped"))

    assert verdict(*lost * (MAX_LOST - 1)) is None
    assert verdict(*lost * MAX_LOST) == "runner_lost"
    assert verdict(*lost, *stopped, *lost * (MAX_LOST - 1)) == "runner_lost"
    assert verdict(*lost * (MAX_LOST - 1), STARTED, SAVED, failed("runner_lost"), *lost) is None


def test_only_time_in_attempts_is_spent() -> None:
    """Waiting and pauses cost nothing; recovering does."""
    told = story(STARTED, SAVED, failed("worker_died"), STARTED, PauseRequested(), Paused(), ResumeRequested())

    assert spent_s(told, now=BEGIN + timedelta(seconds=1000)) == 50.0
    assert spent_s(told[:2], now=BEGIN + timedelta(seconds=1000)) == 990.0


def test_a_run_over_its_time_fails_with_that_reason() -> None:
    """`run_s` ends the run however many failures it has left."""
    request = REQUEST.model_copy(update={"deadlines": Deadlines(run_s=15.0)})

    assert verdict(STARTED, failed("user_code"), request=request) is None
    assert verdict(STARTED, SAVED, failed("user_code"), request=request) == "run_deadline"
