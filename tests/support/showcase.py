"""Runs for the page to show, written straight into a bucket: averages, measurements, and what can go wrong."""

from __future__ import annotations

import hashlib
import math
import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from support.api import DIGITS
from wa_core import layout
from wa_core.averaging.rules import parse_run_rule
from wa_core.catalog.averages import Generations
from wa_core.catalog.landscapes import Landscapes
from wa_core.catalog.runs import RunLog, submit
from wa_core.catalog.verifications import Verifications
from wa_core.clock import ManualClock
from wa_core.records import (
    Assessment,
    AssessmentRecord,
    AttemptFailed,
    AttemptStarted,
    AverageManifest,
    AverageRequest,
    BatchNormDrift,
    BatchNormSummary,
    CheckpointCommitted,
    Comparison,
    Evaluation,
    FileRef,
    Heartbeat,
    LandscapeRecord,
    LandscapeResult,
    LayerDistance,
    MarkedPoint,
    RunRequest,
    SetAside,
    Succeeded,
    TrainingFinished,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.store.base import ObjectStore

AVERAGES = {"swa": "swa:start_step=100", "ema": "ema:half_life=60", "last5": "window:last=5"}
EVERY_STEPS = 20
REJECTED_STEP = 120
TOTAL_STEPS = 264
PWN = '<img src=x onerror="window.__pwned=1"><script>window.__pwned=2</script>'
LAYERS = {
    "stem": 432,
    "bn": 96,
    "blocks.0.conv1": 20_736,
    "blocks.0.bn1": 96,
    "blocks.0.conv2": 20_736,
    "blocks.0.bn2": 96,
    "blocks.1.conv1": 41_472,
    "blocks.1.bn1": 192,
    "blocks.1.conv2": 82_944,
    "blocks.1.bn2": 192,
    "head": 970,
}
_NOISE = (0.9, -0.4, 0.3, 1.2, -0.8, 0.5, -0.2, 1.0, -0.6, 0.7, 0.2, -0.3, 1.1, 0.4, 0.8, -0.1)


class Showcase:
    """One run whose trainer and averager are played, with times as a real one has them.

    `fault` is what the damaged checkpoint's record says, `labels` and `config` go into the submission.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        averages: Mapping[str, str] | None = None,
        labels: dict[str, str] | None = None,
        config: dict[str, str | int] | None = None,
        fault: str = "tensor 'stem.weight' holds 3 values that are not finite",
        started_at: datetime | None = None,
    ) -> None:
        self.store = store
        self.clock = ManualClock(started_at or datetime.now(UTC) - timedelta(minutes=4))
        self.fault = fault
        self.averages = dict(AVERAGES if averages is None else averages)
        requested = [AverageRequest(name=name, rule=rule) for name, rule in self.averages.items()]
        request = RunRequest(
            recipe=DIGITS, averages=requested, labels=labels or {}, config=config or {"epochs": 12, "lr": 0.1}
        )
        self.run_id = submit(store, request, clock=self.clock).run_id
        self.log = RunLog(store, self.run_id, clock=self.clock)
        self._draw = random.Random(7)
        self._num_lines = 0

    def start(self, *, resumed_from: int | None = None) -> None:
        """Let a runner take it."""
        self.clock.advance(3.2)
        self.log.append(AttemptStarted(runner_id="runner-1", resumed_from=resumed_from))
        self.write_log(f"attempt {self.log.attempt}: 2 workers, gloo")

    def train(self, last_step: int) -> None:
        """Commit checkpoints up to a step, and publish the averages after each."""
        first = self.log.lineage[-1].step if self.log.lineage else 0
        for step in [*range(first + EVERY_STEPS, last_step, EVERY_STEPS), last_step]:
            self.clock.advance(2.1 + self._draw.random())
            self._checkpoint(step)
            self._publish()

    def finish(self) -> None:
        """Let the run succeed."""
        self.log.append(TrainingFinished(step=self.log.lineage[-1].step))
        self.clock.advance(1)
        self.log.append(Succeeded())

    def fail_attempt(self, message: str) -> None:
        """Let the attempt be lost."""
        self.log.append(AttemptFailed(reason="worker_lost", message=message))

    def beat(self, step: int) -> None:
        """A sign of life between checkpoints, as of now."""
        beat = Heartbeat(
            who="trainer",
            at=datetime.now(UTC),
            attempt=self.log.attempt,
            step=step,
            total_steps=TOTAL_STEPS,
            steps_per_s=7.0,
            metrics={"loss": 0.213},
        )
        self.store.put(layout.heartbeat(self.run_id, "trainer"), beat.model_dump_json().encode())

    def write_log(self, text: str) -> None:
        """One more line of rank 0."""
        self._num_lines += 1
        key = layout.logs_part(self.run_id, attempt=self.log.attempt, rank=0, part=self._num_lines)
        self.store.put(key, f"{text}\n".encode())

    def _checkpoint(self, step: int) -> None:
        nonce = layout.new_nonce()
        prefix = layout.checkpoint_prefix(self.run_id, attempt=self.log.attempt, step=step, nonce=nonce)
        ref = self._file(prefix + layout.MODEL_FILE, f"{self.run_id} {step} {nonce}".encode())
        rate = 0.1 if step <= 100 else 0.05
        files = {layout.MODEL_FILE: ref}
        self.log.append(
            CheckpointCommitted(step=step, lr=rate, files=files, spec_digest="0" * 64, is_last=step == TOTAL_STEPS)
        )
        self.write_log(f"step {step} of {TOTAL_STEPS}: checkpoint, loss {raw_loss(step):.4f}")

    def _publish(self) -> None:
        self.clock.advance(0.4 + 0.9 * self._draw.random())
        for name, rule in self.averages.items():
            self._publish_one(name, rule)

    def _publish_one(self, name: str, rule: str) -> None:
        known, parsed, lineage = Generations(self.store, self.run_id, name), parse_run_rule(rule), self.log.lineage
        sound = [entry for entry in lineage if entry.step != REJECTED_STEP]
        counted = [entry for entry in sound if parsed.counts(entry.step)]
        coefficients = parsed.coefficients([entry.step for entry in counted])
        if not coefficients:
            return
        manifest = AverageManifest(
            run_id=self.run_id,
            name=name,
            generation=max(known.numbers(), default=0) + 1,
            at=self.clock.now(),
            rule=rule,
            accumulator_dtype="float64",
            cursor=lineage[-1].seq,
            attempt=self.log.attempt,
            folded=[entry.seq for entry in counted if entry.step in coefficients],
            coefficients=coefficients,
            rejected=[self._aside(entry, "not_finite", self.fault) for entry in lineage if entry not in sound],
            skipped=[
                self._aside(entry, "before_start", "the rule counts from step 100")
                for entry in sound
                if entry not in counted
            ],
        )
        known.commit(manifest)
        self.clock.advance(0.5)
        known.commit_assessment(self._assessed(known, manifest))

    def _assessed(self, known: Generations, manifest: AverageManifest) -> AssessmentRecord:
        key = layout.blob(self.run_id, manifest.name, nonce=layout.new_nonce(), file=layout.MODEL_FILE)
        body = f"{manifest.name} {manifest.generation} of {self.run_id}".encode() * 400
        assessment = assessment_of(self.log.lineage[-1].step, manifest)
        return AssessmentRecord(
            run_id=self.run_id,
            name=manifest.name,
            generation=manifest.generation,
            at=self.clock.now(),
            files={layout.MODEL_FILE: self._file(key, body)},
            assessment=assessment,
            best=known.best_with(manifest.generation, assessment),
        )

    def _aside(self, entry: CheckpointCommitted, code: str, message: str) -> SetAside:
        return SetAside(seq=entry.seq, step=entry.step, code=code, message=message)

    def _file(self, key: str, body: bytes) -> FileRef:
        self.store.put(key, body)
        return FileRef(key=key, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())


def raw_loss(step: int) -> float:
    """What the raw weights measure at a step: it falls, and it jumps about."""
    return 0.9 * math.exp(-step / 45) + 0.062 + 0.018 * _NOISE[step // EVERY_STEPS % len(_NOISE)]


def assessment_of(step: int, manifest: AverageManifest) -> Assessment:
    """What the assess process would say of a generation whose newest checkpoint is of `step`."""
    raw = raw_loss(step)
    behind = sum(weight * math.exp(-at / 45) for at, weight in manifest.coefficients.items())
    averaged = 0.55 * behind + 0.02 + 0.03 / manifest.n_averaged
    half = 0.012 + 0.1 * raw
    difference = averaged - raw
    comparison = Comparison(
        metric="loss",
        difference=difference,
        low=difference - half,
        high=difference + half,
        num_samples=360,
        won="averaged" if difference + half < 0 else "raw" if difference - half > 0 else "tie",
    )
    return Assessment(
        raw=_measured(step, raw),
        averaged=_measured(step, averaged),
        before_recalibration=_measured(step, averaged * 0.93),
        batchnorm=BatchNormSummary(
            status="recalibrated", num_layers=5, num_batches=12, num_samples=1437, layers=drifts_of(step)
        ),
        layers=distances_of(step),
        comparison=comparison,
    )


def distances_of(step: int) -> list[LayerDistance]:
    """How far an average is from the raw weights: less in the stem than in the head."""
    found = []
    for number, (name, size) in enumerate(LAYERS.items()):
        relative = (0.03 + 0.016 * number) * (1 + 0.3 * _NOISE[(number + step) % len(_NOISE)])
        distance = relative * math.sqrt(size) * 0.09
        found.append(LayerDistance(name=name, distance=distance, relative=relative, size=size))
    return found


def drifts_of(step: int) -> list[BatchNormDrift]:
    """How far recalibration moved the statistics: more the deeper the layer."""
    names = [name for name in LAYERS if ".bn" in name or name.startswith("bn")]
    return [
        BatchNormDrift(
            name=name,
            mean_shift=(0.02 + 0.015 * number) * (1 + 0.4 * _NOISE[(number + step) % len(_NOISE)]),
            variance_ratio=math.exp(-0.02 - 0.025 * number + 0.05 * _NOISE[(number + 3) % len(_NOISE)]),
        )
        for number, name in enumerate(names)
    ]


def measure_landscapes(run: Showcase, name: str) -> int:
    """Do an averager's work on every landscape that is wanted of an average; how many there were."""
    known = Landscapes(run.store, run.run_id, name)
    wanted = [landscape_id for landscape_id, is_done in known.ids().items() if not is_done]
    for landscape_id in wanted:
        record = known.fetch(landscape_id).record
        known.finish(_line(record) if record.kind == "line" else _plane(record))
    return len(wanted)


def verify_averages(run: Showcase, name: str) -> int:
    """Do an averager's work on every verification that is wanted of an average; how many there were."""
    known = Verifications(run.store, run.run_id, name)
    wanted = [verification_id for verification_id, is_done in known.ids().items() if not is_done]
    for verification_id in wanted:
        finding = {"state": "succeeded", "is_equal": True, "is_state_equal": True, "is_served_equal": True}
        counts = {"num_checkpoints": 9, "num_recalibrated": 21, "took_s": 3.2}
        known.finish(
            known.outcome(verification_id, at=known.fetch(verification_id).record.created_at, **finding, **counts)
        )
    return len(wanted)


def _line(record: LandscapeRecord) -> LandscapeResult:
    places = [-0.25 + 1.5 * index / (record.points - 1) for index in range(record.points)]
    return LandscapeResult(
        landscape_id=record.landscape_id,
        at=record.created_at,
        state="succeeded",
        x=places,
        heldout=[[0.037 + 0.045 * (at - 0.9) ** 2 for at in places]],
        train=[[0.021 + 0.03 * (at - 0.6) ** 2 for at in places]],
        markers=[
            MarkedPoint(label="raw", x=0.0, y=0.0735, loss=0.0735, step=TOTAL_STEPS),
            MarkedPoint(label="average", x=1.0, y=0.0375, loss=0.0375, step=TOTAL_STEPS),
        ],
        num_heldout=360,
        num_train=512,
    )


def _plane(record: LandscapeRecord) -> LandscapeResult:
    side = [-2.0 + 8.0 * index / (record.points - 1) for index in range(record.points)]
    return LandscapeResult(
        landscape_id=record.landscape_id,
        at=record.created_at,
        state="succeeded",
        x=side,
        y=side,
        heldout=[[0.037 + 0.01 * (x - 1.6) ** 2 + 0.02 * (y - 1.4 - 0.2 * x) ** 2 for x in side] for y in side],
        markers=[
            MarkedPoint(label="first", x=0.0, y=0.0, step=100),
            MarkedPoint(label="raw", x=4.0, y=0.0, step=TOTAL_STEPS),
            MarkedPoint(label="average", x=1.8, y=1.7, step=TOTAL_STEPS),
        ],
        num_heldout=360,
    )


def finished_run(store: ObjectStore) -> Showcase:
    """A run that lost a worker, went back, met a damaged checkpoint, and succeeded."""
    run = Showcase(store, labels={"team": "vision", "dataset": "digits"})
    run.start()
    run.train(200)
    run.fail_attempt("rank 1 was killed by signal 9")
    run.start(resumed_from=next(entry.seq for entry in run.log.lineage if entry.step == 160))
    run.train(TOTAL_STEPS)
    run.finish()
    return run


def running_run(store: ObjectStore) -> Showcase:
    """A run in the middle of its training."""
    run = Showcase(store, labels={"team": "vision"}, started_at=datetime.now(UTC) - timedelta(minutes=1))
    run.start()
    run.train(140)
    run.beat(151)
    return run


def hostile_run(store: ObjectStore) -> Showcase:
    """A run whose owner writes HTML wherever there is room for it."""
    run = Showcase(store, labels={"team": PWN}, config={"epochs": 1, "note": PWN}, fault=PWN)
    run.start()
    run.write_log(PWN)
    run.train(180)
    run.fail_attempt(PWN)
    return run


def _measured(step: int, loss: float) -> Evaluation:
    return Evaluation(step=step, metrics={"loss": loss, "accuracy": max(0.0, 1 - 0.33 * loss)})
