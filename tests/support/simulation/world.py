"""One simulation: a seed in, and out of it a story and, if something broke, what."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from support.averaging import Crash
from support.simulation.averagers import BLOBS_PER_COMMIT, running_averager, served_value, stored_value
from support.simulation.bucket import Bucket
from support.simulation.client import SimulatedStore
from support.simulation.clocks import SkewedClock, WorldClock
from support.simulation.inspector import Inspector
from support.simulation.oracle import expected, same_average
from support.simulation.schedule import Schedule
from support.simulation.script import draw_script
from support.simulation.trainer import Trainer
from support.simulation.weather import Trouble, Weather
from wa_core import layout
from wa_core.catalog.retention import Grace
from wa_core.catalog.runs import submit
from wa_core.catalog.sweeper import Sweeper
from wa_core.errors import TransientError
from wa_core.records import AverageRequest, CheckpointPolicy, RunRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.simulation.client import Trace
    from support.simulation.schedule import Actor

RECIPE = "services.recipes.digits:Digits"
MAX_STEPS = 6_000
#: Longer than anything is on its way here, and so short that there is something to sweep.
GRACE = Grace(orphan_s=100_000.0, download_s=0.0, settle_s=10.0)


@dataclass(frozen=True, slots=True)
class Story:
    """How a simulation went. `failure` is None when every invariant held."""

    seed: int
    failure: str | None
    trace: Trace
    troubles: dict[Trouble, int]
    num_fenced: int
    num_rewinds: int


class World:
    """Everything of one simulation."""

    def __init__(self, seed: int, *, scratch: Path) -> None:
        self._scratch = scratch
        self._chance = random.Random(seed)
        self._clock = WorldClock()
        self._script = draw_script(self._chance)
        self._weather = Weather(self._chance)
        self.trace: Trace = []
        self.events: list[str] = []
        run_id, objects = _submitted(self._script.averages, self._script.policy)
        self._run_id = run_id
        self._bucket = Bucket(self._clock, objects)
        self._schedule = Schedule(
            self._chance,
            self._clock,
            stickiness=self._chance.choice((0.2, 0.5, 0.8, 0.95)),
            nap_steps=self._chance.choice((0, 15, 60)),
            max_steps=MAX_STEPS,
        )
        self._inspector = Inspector(
            [request.name for request in self._script.averages],
            objects=self._bucket.objects,
            fail=self._schedule.fail,
            tell=self._news,
        )
        self._inspector.wrote(layout.log_entry(run_id, 1), objects[layout.log_entry(run_id, 1)])
        self._bucket.observer = self._inspector
        self._trainer = Trainer(run_id, self._script, clock=self._clock, open_store=self._process, start=self._add)

    def run(self, seed: int) -> Story:
        """Let it happen, then check how it ended."""
        self._add("trainer", self._trainer.train, weight=self._chance.choice((0.3, 1, 3)))
        for number in range(self._script.num_averagers):
            self._add(f"averager-{number}", self._average)
        if not self._script.policy.keeps_all:
            self._add("sweeper", self._sweep)
        self._schedule.run()
        if self._schedule.failure is None:
            self._check_end()
        return Story(
            seed,
            self._schedule.failure,
            self.trace,
            dict(self._weather.happened),
            self.events.count("fenced"),
            self.events.count("rewind"),
        )

    def happened(self, event: str, detail: str, *, is_error: bool) -> None:
        """The averager logged something; nothing that goes wrong here, but a wrong bit, may be an error to it."""
        self.events.append(event)
        self.trace.append((self._schedule.step, "log", event, detail, ""))
        if is_error and not (event == "run_stalled" and self._weather.happened[Trouble.FLIP]):
            self._schedule.fail(f"{event}: {detail}")

    def _add(self, name: str, body: Callable[[Actor], None], weight: float = 1.0) -> None:
        self._schedule.add(name, body, weight=weight)

    def _news(self) -> None:
        self._schedule.news += 1

    def _process(
        self, actor: Actor, *, may_crash: bool = False, clock: SkewedClock | None = None
    ) -> SimulatedStore:
        return SimulatedStore(
            self._bucket,
            actor,
            schedule=self._schedule,
            weather=self._weather,
            chance=self._chance,
            clock=clock or SkewedClock(self._clock),
            trace=self.trace,
            may_crash=may_crash,
        )

    @property
    def _is_over(self) -> bool:
        return not self._trainer.num_alive and layout.active_marker(self._run_id) not in self._bucket.objects

    def _average(self, actor: Actor) -> None:
        """An averager's life, and its successors': each begins with nothing but the bucket."""
        while not self._is_over:
            try:
                self._average_until_over(actor)
            except Crash:
                self._schedule.pause(actor, steps=self._chance.randint(0, 40))

    def _average_until_over(self, actor: Actor) -> None:
        clock = SkewedClock(self._clock)
        store = self._process(actor, may_crash=True, clock=clock)
        every = self._script.publish_every_folds
        with running_averager(store, clock=clock, folder=self._scratch, publish_every_folds=every) as averager:
            while not self._is_over:
                try:
                    is_busy = averager.tick()
                except TransientError:
                    is_busy = False
                if not is_busy:
                    self._schedule.idle(actor)

    def _sweep(self, actor: Actor) -> None:
        """Sweeps again and again while the others are at work; it may die in the middle of it."""
        while not self._is_over:
            clock = SkewedClock(self._clock)
            store = self._process(actor, may_crash=True, clock=clock)
            try:
                with suppress(TransientError):
                    sweeper = Sweeper(store, self._run_id, clock=clock, grace=GRACE)
                    while not self._is_over:
                        sweeper.sweep()
                        self._schedule.idle(actor)
            except Crash:
                self._schedule.pause(actor, steps=self._chance.randint(0, 40))

    def _check_end(self) -> None:
        fail, inspector = self._schedule.fail, self._inspector
        wanted = "cancelled" if self._script.is_cancelled else "succeeded"
        if inspector.ends != [wanted]:
            fail(f"the run ended as {inspector.ends}, not once as {wanted}")
        for request in self._script.averages:
            self._check_average(request)
        if len(orphans := inspector.orphans()) > BLOBS_PER_COMMIT * self._weather.happened.total():
            fail(f"{len(orphans)} orphans after {dict(self._weather.happened)}: {orphans}")

    def _check_average(self, request: AverageRequest) -> None:
        fail, objects = self._schedule.fail, self._bucket.objects
        lineage, bad = self._inspector.lineage, self._trainer.bad
        sound = tuple((kept.step, kept.attempt) for kept in lineage if kept.seq not in bad)
        wanted = expected(request.rule, request.accumulator_dtype, sound)
        manifest = self._inspector.newest.get(request.name)
        if manifest is None:
            if lineage:
                fail(f"{request.name} was never published")
            return
        found = {int(step): value for step, value in manifest["coefficients"].items()}
        if list(found.items()) != list(wanted.coefficients.items()):
            fail(f"{request.name}: coefficients {found}, not {wanted.coefficients}")
        if wanted.value is None:
            return
        rule = request.rule
        is_looked_into = manifest["shadow"] and not self._chance.randrange(4)  # it costs a tenth of a simulation
        if is_looked_into and not same_average(stored_value(objects, manifest), wanted.value, rule=rule):
            fail(f"{request.name}: the shadow's value is not the offline average of {sound}")
        record = self._inspector.assessments.get((request.name, manifest["generation"]))
        if record is None:
            fail(f"{request.name}: generation {manifest['generation']} was never assessed")
        elif not same_average(served_value(objects, record), wanted.value, rule=rule):
            fail(f"{request.name}: the served weights are not the offline average of {sound}")


@cache
def _submitted(averages: tuple[AverageRequest, ...], policy: CheckpointPolicy) -> tuple[str, dict[str, bytes]]:
    """A bucket with one run in it."""
    clock = WorldClock()
    bucket = Bucket(clock)
    request = RunRequest(recipe=RECIPE, averages=list(averages), checkpoint=policy)
    spec = submit(bucket, request, clock=clock)
    return spec.run_id, bucket.objects
