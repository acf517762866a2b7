"""A whole run in miniature: trainer, averagers and their rules, with states and checkpoints of a few bytes.

What an average has folded is kept as the list of log seqs itself, so a state that is wrong is seen at once. The
modelled averager keeps the rules of the real one: it goes back to the newest generation inside the lineage whose
state can be read, publishes create-once numbers, and after going back uploads its state anew.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.windows import WindowRule
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_file
from wa_core.catalog.runs import RunLog, add_average, requested_averages, submit
from wa_core.clock import ManualClock
from wa_core.errors import FencedError, ObjectNotFoundError
from wa_core.records import (
    AttemptStarted,
    AverageManifest,
    AverageRequest,
    CheckpointCommitted,
    CheckpointPolicy,
    RunRequest,
    SetAside,
    Succeeded,
    TrainingFinished,
    new_write_id,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.store.base import ObjectStore

SOUND, FAULTY = b"sound", b"faulty"


class MiniatureRun:
    """A run whose checkpoints are five bytes."""

    def __init__(self, store: ObjectStore, *, averages: Mapping[str, str], policy: CheckpointPolicy) -> None:
        self.store = store
        self.clock = ManualClock()
        requested = [AverageRequest(name=name, rule=rule) for name, rule in averages.items()]
        request = RunRequest(recipe="a.b:C", averages=requested, checkpoint=policy)
        self.spec = submit(store, request, clock=self.clock)
        self.run_id = self.spec.run_id
        self.log = RunLog(store, self.run_id, clock=self.clock)
        self.attempt(resumed_from=None)

    @property
    def averages(self) -> dict[str, AverageRequest]:
        """What was asked for, by name."""
        self.log.refresh()
        return {asked.name: asked for asked in requested_averages(self.spec, self.log.entries)}

    def attempt(self, *, resumed_from: int | None) -> None:
        """Let a new attempt go on from a checkpoint."""
        self.log.append(AttemptStarted(runner_id="test", resumed_from=resumed_from))

    def checkpoint(self, step: int, *, body: bytes = SOUND, loss: float | None = None) -> CheckpointCommitted:
        """Upload and commit a checkpoint."""
        prefix = layout.checkpoint_prefix(
            self.run_id, attempt=self.log.attempt, step=step, nonce=layout.new_nonce()
        )
        files = {
            name: put_file(self.store, prefix + name, body) for name in (layout.MODEL_FILE, layout.TRAINER_FILE)
        }
        metrics = {} if loss is None else {"loss": loss}
        return self.log.append(CheckpointCommitted(step=step, files=files, spec_digest="0" * 64, metrics=metrics))

    def add_average(self, name: str, rule: str) -> None:
        """Ask for one more average."""
        add_average(self.store, self.run_id, AverageRequest(name=name, rule=rule), clock=self.clock)

    def succeed(self) -> None:
        """End the run well."""
        self.log.append(TrainingFinished(step=0))
        self.log.append(Succeeded())

    def has(self, entry: CheckpointCommitted) -> bool:
        """Whether all of a checkpoint's files are there."""
        return all(exists(self.store, ref.key) for ref in entry.files.values())


@dataclass
class MiniatureAverager:
    """One averager's memory of one average; several of them may work on the same one."""

    run: MiniatureRun
    name: str
    _manifest: AverageManifest | None = None
    _newest: int = 0
    _is_state_stored: bool = True

    def __post_init__(self) -> None:
        self._log = RunLog(self.run.store, self.run.run_id, clock=self.run.clock)
        self._generations = Generations(self.run.store, self.run.run_id, self.name)
        self._rule = parse_rule(self.run.averages[self.name].rule)

    @property
    def manifest(self) -> AverageManifest | None:
        """What it would publish."""
        return self._manifest

    def crash(self) -> None:
        """Lose what is in memory."""
        self._manifest = None

    def step(self, *, can_read_newest: bool = True) -> bool:
        """Go back if need be, or take one checkpoint; returns whether there was anything to do."""
        self._log.refresh()
        lineage = {entry.seq: entry for entry in self._log.lineage}
        if self._manifest is None or not lineage.keys() >= set(self._manifest.folded):
            self._load(lineage, can_read_newest=can_read_newest)
            return True
        entry = next((entry for seq, entry in lineage.items() if seq > self._manifest.cursor), None)
        if entry is not None:
            self._take(entry, lineage)
        return entry is not None

    def publish(self) -> None:
        """Commit what is in memory as the next generation."""
        if self._manifest is None:
            return
        shadow = self._manifest.shadow
        if not self._is_state_stored and self._manifest.folded and not isinstance(self._rule, WindowRule):
            key = layout.blob(self.run.run_id, self.name, nonce=layout.new_nonce(), file=layout.SHADOW_FILE)
            shadow = put_file(self.run.store, key, json.dumps(self._manifest.folded).encode())
        stamp = {"generation": self._newest + 1, "write_id": new_write_id(), "shadow": shadow}
        manifest = self._manifest.model_copy(update=stamp)
        try:
            self._generations.commit(manifest)
        except FencedError:
            self.crash()
            return
        self._manifest, self._newest, self._is_state_stored = manifest, manifest.generation, True

    def catch_up(self) -> AverageManifest:
        """Take everything there is, and publish it."""
        while self.step():
            pass
        self.publish()
        while self.step():  # fenced: the other one's generation is loaded
            pass
        assert self._manifest is not None
        return self._manifest

    def _load(self, lineage: Mapping[int, CheckpointCommitted], *, can_read_newest: bool) -> None:
        numbers = self._generations.numbers()
        self._newest = numbers[-1] if numbers else 0
        for manifest in self._generations.newest_first():
            if manifest.generation == self._newest and not can_read_newest:
                continue
            if lineage.keys() >= set(manifest.folded) and self._is_readable(manifest):
                self._manifest = manifest
                self._is_state_stored = manifest.generation == self._newest
                return
        asked = self.run.averages[self.name]
        self._is_state_stored = True
        self._manifest = AverageManifest(
            run_id=self.run.run_id,
            name=self.name,
            generation=1,
            at=self.run.clock.now(),
            rule=asked.rule,
            accumulator_dtype=asked.accumulator_dtype,
            cursor=0,
        )

    def _is_readable(self, manifest: AverageManifest) -> bool:
        if manifest.shadow is None:
            return True
        try:
            return bool(json.loads(self.run.store.get(manifest.shadow.key)) == manifest.folded)
        except ObjectNotFoundError:
            return False

    def _take(self, entry: CheckpointCommitted, lineage: Mapping[int, CheckpointCommitted]) -> None:
        assert self._manifest is not None
        changes: dict[str, object] = {"cursor": entry.seq}
        if not self._rule.counts(entry.step):
            aside = SetAside(seq=entry.seq, step=entry.step, code="before_start")
            changes["skipped"] = [*self._manifest.skipped, aside]
        elif fault := self._fault_of(entry):
            aside = SetAside(seq=entry.seq, step=entry.step, code=fault)
            changes["rejected"] = [*self._manifest.rejected, aside]
        else:
            folded = [*self._manifest.folded, entry.seq]
            if isinstance(self._rule, WindowRule):
                steps = {lineage[seq].step: seq for seq in folded}
                folded = [steps[step] for step in self._rule.coefficients(list(steps))]
            changes["folded"] = folded
            self._is_state_stored = False
        self._manifest = self._manifest.model_copy(update=changes)

    def _fault_of(self, entry: CheckpointCommitted) -> str | None:
        try:
            return None if self.run.store.get(entry.files[layout.MODEL_FILE].key) == SOUND else "faulty"
        except ObjectNotFoundError:
            return "missing"


def exists(store: ObjectStore, key: str) -> bool:
    """Whether an object has this key."""
    try:
        store.head(key)
    except ObjectNotFoundError:
        return False
    return True
