"""What takes many calls: pages one after the other, a run watched to its end, logs followed.

A script is a generator that yields what it wants: a `Call` to be sent, whose result it is then sent; a `Rest`; or
something `Found`, for the caller. It neither sends nor waits, so both clients play the same scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from services.client import calls
from services.client.calls import Call

if TYPE_CHECKING:
    from services.client.answers import Checkpoint, Delivery, Event, Generation, LogLine, Metrics, Page, Run

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Rest:
    """Wait so long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Found(Generic[T_co]):
    """Hand this to the caller."""

    value: T_co


Script = Generator[Call[Any] | Rest | Found[T], Any, None]


def all_runs(
    *,
    state: str | None = None,
    label: str | None = None,
    owner: str | None = None,
    since: str | None = None,
    page_size: int = 100,
) -> Script[Run]:
    """Every run, newest first, page after page as they are wanted; the filters are those of `runs`."""
    return _pages(
        lambda after: calls.runs(state=state, label=label, owner=owner, since=since, limit=page_size, after=after)
    )


def all_events(run_id: str, *, after: int = 0) -> Script[Event]:
    """The run's log after entry `after`, as far as it goes now."""
    return _pages(lambda cursor: calls.events(run_id, after=cursor), after=after)


def all_logs(
    run_id: str, *, rank: int | str = 0, attempt: int | None = None, after: str | None = None
) -> Script[LogLine]:
    """The lines that a rank, or the ``"driver"``, has written so far."""
    return _pages(lambda cursor: calls.logs(run_id, rank=rank, attempt=attempt, after=cursor), after=after)


def all_metrics(run_id: str, *, after: str | None = None) -> Script[Metrics]:
    """What has been measured so far, oldest first."""
    return _pages(lambda cursor: calls.metrics(run_id, after=cursor), after=after)


def all_checkpoints(run_id: str) -> Script[Checkpoint]:
    """All committed checkpoints in order; `is_abandoned` marks those that no average counts."""
    return _pages(lambda cursor: calls.checkpoints_page(run_id, after=cursor))


def all_deliveries(run_id: str) -> Script[Delivery]:
    """All messages to a run's webhooks: ``delivered``, ``given_up`` or ``pending``."""
    return _pages(lambda cursor: calls.deliveries_page(run_id, after=cursor))


def all_generations(run_id: str, name: str, *, every: bool = False) -> Script[Generation]:
    """The whole history of an average, oldest first; with `every`, also what was never measured."""
    return _pages(lambda after: calls.generations(run_id, name, after=after, every=every))


def watch(run_id: str, *, poll_s: float = POLL_S) -> Script[Run]:
    """The run now and after every change, until it has ended."""
    last = None
    while True:
        run: Run = yield calls.run(run_id)
        if run != last:
            yield Found(run)
        if run.has_ended:
            return
        last = run
        yield Rest(poll_s)


def follow_events(run_id: str, *, after: int = 0, poll_s: float = POLL_S) -> Script[Event]:
    """The run's log after entry `after` as it grows, until the run has ended. Nothing comes twice."""
    return _follow(run_id, lambda cursor: calls.events(run_id, after=cursor), after=after, poll_s=poll_s)


def follow_logs(
    run_id: str, *, rank: int | str = 0, after: str | None = None, poll_s: float = POLL_S
) -> Script[LogLine]:
    """The lines of a rank, or of ``"driver"``, as they are written, until the run has ended."""
    return _follow(run_id, lambda cursor: calls.logs(run_id, rank=rank, after=cursor), after=after, poll_s=poll_s)


def follow_metrics(run_id: str, *, after: str | None = None, poll_s: float = POLL_S) -> Script[Metrics]:
    """What is measured while the run trains, until it has ended."""
    return _follow(run_id, lambda cursor: calls.metrics(run_id, after=cursor), after=after, poll_s=poll_s)


def _pages(
    page_after: Callable[[Any], Call[Page[T]]],
    *,
    after: Any = None,  # noqa: ANN401  a cursor
) -> Script[T]:
    while True:
        page: Page[T] = yield page_after(after)
        for item in page.data:
            yield Found(item)
        if not page.has_more:
            return
        after = page.next


def _follow(
    run_id: str,
    page_after: Callable[[Any], Call[Page[T]]],
    *,
    after: Any,  # noqa: ANN401  a cursor
    poll_s: float,
) -> Script[T]:
    """A feed, from a cursor on. The cursor moves with each page, so a service that was away is no gap."""
    is_over = False
    while True:
        page: Page[T] = yield page_after(after)
        after = page.next
        for item in page.data:
            yield Found(item)
        if page.has_more:
            continue
        if is_over:
            return
        run: Run = yield calls.run(run_id)
        is_over = run.has_ended  # and read once more after that
        yield Rest(0.0 if is_over else poll_s)
