from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.logs import checkpoint, open_log, submitted
from wa_core.catalog.runs import (
    lineage,
    state_after,
)
from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    Cancelled,
    CancelRequested,
    Failed,
    LogEntry,
    Paused,
    PauseRequested,
    ResumeRequested,
    RunState,
    Submitted,
    Succeeded,
    TrainingFinished,
)
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Sequence


class TestState:
    """The state follows from the state before and the entry."""

    @pytest.mark.parametrize(
        ("entries", "expected"),
        [
            ([Submitted()], RunState.QUEUED),
            ([Submitted(), AttemptStarted(runner_id="r")], RunState.STARTING),
            ([AttemptStarted(runner_id="r"), checkpoint(1)], RunState.RUNNING),
            ([AttemptStarted(runner_id="r"), CancelRequested()], RunState.STARTING),
            ([AttemptStarted(runner_id="r"), AttemptFailed(reason="x")], RunState.RECOVERING),
            ([AttemptStarted(runner_id="r"), PauseRequested(), checkpoint(1)], RunState.PAUSING),
            ([AttemptStarted(runner_id="r"), PauseRequested(), Paused(), ResumeRequested()], RunState.QUEUED),
            ([TrainingFinished(step=1), Succeeded()], RunState.SUCCEEDED),
            ([AttemptFailed(reason="x"), Failed(reason="x")], RunState.FAILED),
            ([CancelRequested(), Cancelled()], RunState.CANCELLED),
        ],
    )
    def test_states_follow_from_entries(self, entries: Sequence[LogEntry], expected: RunState) -> None:
        """Each way through a run's life ends in the state that its name promises."""
        state = RunState.QUEUED
        for entry in entries:
            state = state_after(state, entry)

        assert state is expected

    def test_the_owners_last_wish_counts(self) -> None:
        """A pause is undone by a resume; a cancel request outlives both."""
        store = MemoryStore()
        log = open_log(store, submitted(store))
        wishes = []
        for entry in (PauseRequested(), ResumeRequested(), CancelRequested(), AttemptFailed(reason="x")):
            log.append(entry)
            wishes.append(log.desired_state)

        assert wishes == ["paused", "succeeded", "cancelled", "cancelled"]


class TestLineage:
    """An average never mixes two branches of a run."""

    def test_f17_rewinds_abandon_what_came_after(self) -> None:
        """F17: restarted from an older step, twice, only the surviving path is left, in order."""
        log = [
            AttemptStarted(seq=1, runner_id="r"),
            checkpoint(10).model_copy(update={"seq": 2}),
            checkpoint(20).model_copy(update={"seq": 3}),
            checkpoint(30).model_copy(update={"seq": 4}),
            AttemptStarted(seq=5, runner_id="r", resumed_from=3),
            checkpoint(30).model_copy(update={"seq": 6}),
            AttemptStarted(seq=7, runner_id="r", resumed_from=2),
            checkpoint(20).model_copy(update={"seq": 8}),
        ]

        assert [entry.seq for entry in lineage(log[:4])] == [2, 3, 4]
        assert [entry.seq for entry in lineage(log[:5])] == [2, 3]
        assert [entry.seq for entry in lineage(log[:6])] == [2, 3, 6]
        assert [entry.seq for entry in lineage(log)] == [2, 8]

    def test_starting_over_abandons_everything(self) -> None:
        """An attempt that grew from no checkpoint leaves none of the older ones."""
        log = [checkpoint(10).model_copy(update={"seq": 2}), AttemptStarted(seq=3, runner_id="r")]

        assert lineage(log) == []

    @given(st.lists(st.none() | st.integers(0, 30), max_size=12))
    def test_lineage_is_the_path_through_the_tree(self, resumes: list[int | None]) -> None:
        """For any history the lineage equals the path from the root to the newest checkpoint of the tree."""
        entries: list[LogEntry] = []
        parent: dict[int, int | None] = {}
        head: int | None = None
        for seq, resume in enumerate(resumes, start=1):
            committed = path_to(head, parent)
            if resume is None or resume % 3:
                entries.append(checkpoint(seq).model_copy(update={"seq": seq}))
                parent[seq], head = head, seq
            else:
                head = committed[resume % len(committed)] if committed else None
                entries.append(AttemptStarted(seq=seq, runner_id="r", resumed_from=head))

        assert [entry.seq for entry in lineage(entries)] == path_to(head, parent)


def path_to(node: int | None, parent: dict[int, int | None]) -> list[int]:
    """The way from the root to `node`."""
    path: list[int] = []
    while node is not None:
        path.insert(0, node)
        node = parent[node]
    return path
