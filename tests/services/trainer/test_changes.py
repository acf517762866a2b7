"""What owners changed on the way, as the log tells it."""

from __future__ import annotations

from services.trainer.changes import Change, changes_of
from wa_core.records import AttemptFailed, AttemptStarted, CheckpointCommitted, LogEntry, ResumeRequested


def story(*entries: LogEntry) -> list[LogEntry]:
    """A log of these entries."""
    return [entry.model_copy(update={"seq": seq}) for seq, entry in enumerate(entries, start=1)]


def started(resumed_from: int | None = None) -> AttemptStarted:
    """An attempt begins."""
    return AttemptStarted(runner_id="test", resumed_from=resumed_from)


def saved(step: int) -> CheckpointCommitted:
    """A checkpoint."""
    return CheckpointCommitted(step=step, files={}, spec_digest="0" * 64)


def wished(from_step: int | None = None, *, lr_scale: float = 1.0, skip_batches: int = 0) -> ResumeRequested:
    """An owner's wish."""
    return ResumeRequested(from_step=from_step, lr_scale=lr_scale, skip_batches=skip_batches)


def test_a_run_that_nobody_changed_has_no_changes() -> None:
    """Attempts and plain resumes alone change nothing: step n trains on batch n."""
    changes = changes_of(story(started(), saved(10), wished(), started(2)))

    assert changes.items == ()
    assert (changes.lr_scale(10), changes.batch(10)) == (1.0, 10)


def test_a_change_counts_from_where_the_run_went_on() -> None:
    """Before that step all is as it was; from it on rates are scaled and batches left out."""
    changes = changes_of(
        story(started(), saved(10), saved(20), wished(10, lr_scale=0.5, skip_batches=3), started(2))
    )

    assert changes.items == (Change(10, lr_scale=0.5, skip_batches=3),)
    assert [changes.batch(step) for step in (9, 10, 11)] == [9, 13, 14]
    assert [changes.lr_scale(step) for step in (9, 10)] == [1.0, 0.5]


def test_a_change_survives_attempts_that_fail() -> None:
    """F16: an attempt that recovers, even from a checkpoint before the change, applies it at the same step."""
    told = (started(), saved(10), saved(20), wished(20, lr_scale=0.5), started(3))
    recovered = story(*told, AttemptFailed(reason="worker_died"), started(3))
    fallen_back = story(*told, AttemptFailed(reason="corrupt"), started(2))

    assert changes_of(recovered) == changes_of(fallen_back) == changes_of(story(*told))


def test_changes_add_up_along_the_path() -> None:
    """Two changes at different steps both count: scales multiply, skipped batches add."""
    first = (started(), saved(10), wished(10, lr_scale=0.5, skip_batches=3), started(2), saved(20))
    changes = changes_of(story(*first, wished(20, lr_scale=0.1, skip_batches=4), started(5)))

    assert (changes.lr_scale(19), changes.lr_scale(20)) == (0.5, 0.05)
    assert (changes.batch(19), changes.batch(20)) == (22, 27)


def test_f17_going_back_takes_back_what_was_changed_later() -> None:
    """F17: a rewind to a step replaces what was changed at it or behind it, and keeps what was changed before."""
    first = (started(), saved(10), wished(10, skip_batches=3), started(2), saved(20))
    again = story(*first, wished(10, lr_scale=0.1), started(2))
    further = story(*first, wished(20, lr_scale=0.1), started(5))
    plain = story(*first, wished(10), started(2))

    assert changes_of(again).items == (Change(10, lr_scale=0.1),)
    assert changes_of(further).items == (Change(10, skip_batches=3), Change(20, lr_scale=0.1))
    assert changes_of(plain).items == ()


def test_wishes_before_an_attempt_are_taken_in_order() -> None:
    """Of two rewinds before any attempt the later one counts; a plain resume after one keeps its change."""
    first = (started(), saved(10), saved(20))
    twice = story(*first, wished(20, lr_scale=0.5), wished(10, lr_scale=0.1), started(2))
    paused = story(*first, wished(10, lr_scale=0.1), wished(), started(2))

    assert changes_of(twice) == changes_of(paused)
    assert changes_of(twice).items == (Change(10, lr_scale=0.1),)
