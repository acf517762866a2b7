"""F25: whatever happens to a run, and whenever its objects are swept, nothing that is needed goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.histories import FAULTY, SOUND, MiniatureAverager, MiniatureRun, exists
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.windows import WindowRule
from wa_core.catalog.averages import Generations
from wa_core.catalog.retention import Delete, Grace, plan
from wa_core.catalog.survey import Survey
from wa_core.catalog.sweeper import Sweeper, fetch_store_time
from wa_core.records import CheckpointCommitted, CheckpointPolicy
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Sequence

AVERAGES = {
    "swa": "swa",
    "late": "ema:half_life=30,start_step=40",
    "power": "power:sigma_rel=0.1",
    "window": "window:last=3",
}
GRACE = Grace(settle_s=0.0)
_OPTIONAL = st.none() | st.integers(1, 3)


def kept_by_policy(lineage: Sequence[CheckpointCommitted], policy: CheckpointPolicy) -> set[int]:
    """What docs/guides/storage.md says that the policy keeps, by brute force."""
    if policy.keep_last is None and policy.keep_every_steps is None and policy.keep_best is None:
        return {entry.seq for entry in lineage}
    kept = {entry.seq for entry in lineage[-1:]}
    kept |= {entry.seq for entry in lineage[len(lineage) - (policy.keep_last or 0) :]}
    every = policy.keep_every_steps
    for multiple in range(every, lineage[-1].step + 1, every) if every and lineage else ():
        kept.add(next(entry.seq for entry in lineage if entry.step >= multiple))
    rated = [entry for entry in reversed(lineage) if "loss" in entry.metrics]
    rated.sort(key=lambda entry: entry.metrics["loss"])
    return kept | {entry.seq for entry in rated[: policy.keep_best or 0]}


class Histories(RuleBasedStateMachine):
    """One trainer, two averagers for each average, any number of sweepers, which may be stopped at a bad moment.

    A stopped sweeper deletes what it had decided whenever it wakes up, without looking again.
    """

    @initialize(last=_OPTIONAL, every=st.none() | st.integers(1, 60), best=_OPTIONAL)
    def begin(self, last: int | None, every: int | None, best: int | None) -> None:
        """A run with one average of each kind, and a policy."""
        self.store = MemoryStore()
        policy = CheckpointPolicy(keep_last=last, keep_every_steps=every, keep_best=best)
        self.run = MiniatureRun(self.store, averages=AVERAGES, policy=policy)
        self.policy = policy
        self.averagers = {name: [MiniatureAverager(self.run, name) for _ in range(2)] for name in AVERAGES}
        self.sweepers = [Sweeper(self.store, self.run.run_id, clock=self.run.clock, grace=GRACE) for _ in range(2)]
        self.faulty: set[int] = set()
        self.stopped: list[list[str]] = []
        self.released: set[int] = set()  # checkpoints that some sweep was allowed to delete
        self.lost: dict[str, set[int]] = {name: set() for name in AVERAGES}

    @property
    def lineage(self) -> list[CheckpointCommitted]:
        """The surviving checkpoints."""
        self.run.log.refresh()
        return list(self.run.log.lineage)

    @rule(
        gaps=st.lists(st.integers(1, 25), min_size=1, max_size=6),
        body=st.sampled_from([SOUND, SOUND, SOUND, FAULTY]),
        loss=st.none() | st.floats(0, 1),
        every=st.sampled_from([0, 1, 1, 2, 3]),
        which=st.integers(0, 1),
    )
    def train(self, gaps: list[int], body: bytes, loss: float | None, every: int, which: int) -> None:
        """Some checkpoints; one of the averagers publishes `every` so many, or none of them."""
        for number, gap in enumerate(gaps, start=1):
            step = self.lineage[-1].step if self.lineage else 0
            entry = self.run.checkpoint(step + gap, body=body, loss=loss)
            if body == FAULTY:
                self.faulty.add(entry.seq)
            for workers in self.averagers.values() if every and number % every == 0 else ():
                workers[which].catch_up()

    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        """To any checkpoint that the policy keeps, and always has kept."""
        kept = kept_by_policy(self.lineage, self.policy) - self.released
        if kept:
            self.run.attempt(resumed_from=data.draw(st.sampled_from(sorted(kept))))

    @rule(
        name=st.sampled_from(sorted(AVERAGES)),
        which=st.integers(0, 1),
        folds=st.integers(1, 6),
        ends=st.booleans(),
    )
    def average(self, name: str, which: int, folds: int, *, ends: bool) -> None:
        """One average alone gets on, perhaps without publishing."""
        for _ in range(folds):
            self.averagers[name][which].step()
        if ends:
            self.averagers[name][which].publish()

    @rule(which=st.integers(0, 1), can_read_newest=st.booleans())
    def crash(self, which: int, *, can_read_newest: bool) -> None:
        """The newest states may turn out unreadable: the ones before them stand in."""
        for workers in self.averagers.values():
            workers[which].crash()
            workers[which].step(can_read_newest=can_read_newest)
            workers[which].catch_up()

    @rule(which=st.integers(0, 1))
    def sweep(self, which: int) -> None:
        """At any moment."""
        self._note_released()
        self.sweepers[which].sweep()

    @rule()
    def stop_a_sweeper(self) -> None:
        """Between deciding and deleting."""
        self._note_released()
        found = Survey(self.store, self.run.run_id, clock=self.run.clock).take()
        verdicts = plan(found.picture, found.objects, now=fetch_store_time(self.store), grace=GRACE)
        self.stopped.append([key for key, verdict in verdicts.items() if isinstance(verdict, Delete)])

    @precondition(lambda self: self.stopped)
    @rule(data=st.data())
    def wake_a_sweeper(self, data: st.DataObject) -> None:
        """It deletes what it had decided then."""
        for key in self.stopped.pop(data.draw(st.integers(0, len(self.stopped) - 1))):
            self.store.delete(key)

    @invariant()
    def newest_generations_are_whole(self) -> None:
        """Every state that a newest generation names is there."""
        for name in self.averagers:
            newest = Generations(self.store, self.run.run_id, name).newest()
            assert newest is None or newest.shadow is None or exists(self.store, newest.shadow.key)

    @invariant()
    def kept_checkpoints_are_there(self) -> None:
        """What the policy keeps, and always has kept, is there, whole."""
        kept = kept_by_policy(self.lineage, self.policy) - self.released
        assert all(self.run.has(entry) for entry in self.lineage if entry.seq in kept)

    @invariant()
    def nothing_needed_was_missing(self) -> None:
        """An averager that has fallen behind may miss one that has gone, but it is fenced and never says so."""
        for name in self.averagers:
            newest = Generations(self.store, self.run.run_id, name).newest()
            missing = {aside.seq for aside in newest.rejected if aside.code == "missing"} if newest else set()
            assert missing <= self.lost[name] | self.faulty

    def teardown(self) -> None:
        """In the end every average is what it would be had nothing ever been deleted."""
        if not hasattr(self, "run"):
            return
        for name, workers in self.averagers.items():
            workers[0].crash()
            manifest = workers[0].catch_up()
            asked = parse_rule(self.run.averages[name].rule)
            sound = [e for e in self.lineage if asked.counts(e.step) and e.seq not in self.faulty]
            expected = [entry.seq for entry in sound if entry.seq not in self.lost[name]]
            if isinstance(asked, WindowRule):
                expected = expected[-3:]
                assert all(self.run.has(entry) for entry in sound if entry.seq in expected)
            assert manifest.folded == expected
        self.nothing_needed_was_missing()

    def _note_released(self) -> None:
        kept = kept_by_policy(self.lineage, self.policy)
        self.released |= {entry.seq for entry in self.lineage if entry.seq not in kept}


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestHistories = Histories.TestCase
