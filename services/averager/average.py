"""One average of one run: what it has taken so far, and its generations in the bucket.

Invariant: memory is always the newest readable generation inside the lineage plus the checkpoints taken since,
in log order; or it says that it `is_broken`. So a crash, or losing a generation to another worker, costs a replay
and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from services.averager import telemetry
from services.averager.accumulation import FoldedAccumulation, WindowAccumulation
from wa_core import layout
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.policy import AverageView
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.windows import WindowRule
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_file, put_path
from wa_core.catalog.rebuilt_state import make_rebuilt_state
from wa_core.errors import CorruptError, FencedError, InvalidInputError
from wa_core.records import AverageManifest, SetAside, new_write_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from services.averager.accumulation import Accumulation
    from services.averager.scratch import Scratch
    from wa_core.averaging.files.sources import Source
    from wa_core.averaging.streamed_shadow import StreamedShadow
    from wa_core.catalog.rebuild import Rebuild
    from wa_core.clock import Clock
    from wa_core.errors import WeightAveragingError
    from wa_core.records import AverageRequest, CheckpointCommitted, FileRef
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

_READS = 3  # of a state, before an older one is used


class RunningAverage:
    """Takes checkpoints and publishes generations.

    `look` and `load` must come first, and after every `FencedError`.

    Args:
        store: the bucket.
        run_id: the run.
        request: the average that was asked for.
        clock: the time source.
        scratch: working space.
        on_progress: called from time to time during uploads; what it raises ends them.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        request: AverageRequest,
        *,
        clock: Clock,
        scratch: Scratch,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = request.name
        self.rule = parse_rule(request.rule)
        self._store = store
        self._clock = clock
        self._request = request
        self._run_id = run_id
        self._scratch = scratch
        self._on_progress = on_progress
        self._generations = Generations(store, run_id, request.name)
        self._accumulation: Accumulation = self._new_accumulation()
        self._manifest = self._blank()
        self._taken: list[CheckpointCommitted] = []
        self._newest_number = 0
        self._assessed_number: int | None = None
        self._num_unpublished = 0
        self._is_loaded = self._is_dirty = False
        self._is_state_stored = True

    @property
    def view(self) -> AverageView:
        """Where it stands, for the policy."""
        return AverageView(
            name=self.name,
            cursor=self._manifest.cursor,
            folded=frozenset(self._manifest.folded),
            num_unpublished=self._num_unpublished,
            is_dirty=self._is_dirty,
            is_assessed=self._assessed_number == self._newest_number,
            attempt=self._manifest.attempt,
        )

    @property
    def manifest(self) -> AverageManifest:
        """What the next generation will say, or what the newest says when nothing was taken since."""
        return self._manifest

    @property
    def shadow(self) -> StreamedShadow | None:
        """What a checkpoint is folded into before `take`; None when there is nothing to fold into."""
        return self._accumulation.shadow

    @property
    def is_broken(self) -> bool:
        """Whether `load` has to come before anything else."""
        return not self._is_loaded or (self.shadow is not None and self.shadow.is_broken)

    def look(self) -> None:
        """See which generations there are, for the next `load`.

        Raises:
            TransientError: the store is away; `is_broken` until the next `load`.
        """
        self._is_loaded = False
        self._newest_number = self._generations.newest_number()

    def load(self, lineage: Mapping[int, CheckpointCommitted]) -> None:
        """Go back to the newest generation seen that holds nothing from outside `lineage` (log seq -> checkpoint).

        The log must have been read after the last `look`.

        Raises:
            TransientError: the store is away; `is_broken` until the next `load`.
        """
        found = self._start_from_newest_inside(lineage)
        # A newer generation of an abandoned branch is still the newest: publish over it even with no new fold.
        self._is_dirty = found < self._newest_number
        # A generation names the state of the one before it or a new one: a sweeper may have let go of any other.
        self._is_state_stored = not self._is_dirty or self._manifest.shadow is None
        self._assessed_number = self._generations.newest_assessed_number() or None
        self._is_loaded = True

    def prepare(self, entry: CheckpointCommitted, source: Source) -> None:
        """Refuse a checkpoint that does not fit those before it; make room before the first one.

        Raises:
            InvalidInputError: its step is not after theirs (`step_backwards`).
            IncompatibleError: how its tensors differ.
            StoreUnavailableError: there is no room.
        """
        if self._taken and entry.step <= self._taken[-1].step:
            raise InvalidInputError(
                f"the checkpoint of step {entry.step} follows the one of step {self._taken[-1].step} in the same "
                f"attempt; steps must go forward, a run that goes back starts a new attempt",
                code="step_backwards",
            )
        self._accumulation.prepare(source, taken=self._taken)

    def take(self, entry: CheckpointCommitted) -> None:
        """A checkpoint that counts has been read, found sound, and folded into `shadow`."""
        folded, coefficients = self._accumulation.after(entry, taken=self._taken)
        inside = set(folded)
        self._taken = [known for known in (*self._taken, entry) if known.seq in inside]
        self._advance(entry, folded=folded, coefficients=coefficients)
        self._is_state_stored = False

    def skip(self, entry: CheckpointCommitted) -> None:
        """Record that the rule does not count a checkpoint."""
        reason = f"the rule {self.rule.spelling} starts at step {self.rule.start_step}"
        self._set_aside("skipped", entry, code="before_start", message=reason)

    def pass_over(self, entries: Iterable[CheckpointCommitted]) -> None:
        """Record checkpoints that its window has left behind already; they need not be there any more."""
        reason = f"no longer in {self.rule.spelling} when the average was added"
        for entry in entries:
            self._set_aside("skipped", entry, code="before_window", message=reason)

    def reject(self, entry: CheckpointCommitted, error: WeightAveragingError) -> None:
        """Record that a checkpoint cannot be folded, and why; folding goes on with the next."""
        log.warning("rejected", run_id=self._run_id, average=self.name, step=entry.step, code=error.code)
        self._set_aside("rejected", entry, code=error.code, message=error.message)

    def publish(self, *, attempt: int) -> AverageManifest:
        """Commit what was taken as the next generation; `attempt` is the newest one that the log knows of.

        Raises:
            FencedError: another averager published that generation first; `load` before going on.
        """
        state, uploaded = self._manifest.shadow, None
        if not self._is_state_stored:
            state = uploaded = self._upload_state()
        manifest = self._commit(state, uploaded=uploaded, attempt=attempt)
        self._num_unpublished, self._is_dirty, self._is_state_stored = 0, False, True
        return manifest

    @property
    def is_unstarted(self) -> bool:
        """Whether nothing has ever been taken or published."""
        return self._newest_number == 0 and self._manifest.cursor == 0

    def begin_rebuilt(self, plan: Rebuild, *, attempt: int) -> AverageManifest:
        """Make the first generation out of what is kept, since some checkpoints are not; `load` must follow.

        Raises:
            FencedError: another averager has published it first.
            CorruptError: a part is gone or damaged; plan anew.
        """
        assert not isinstance(self.rule, WindowRule), "windows are never rebuilt"  # noqa: S101  the planner's promise
        path = self._scratch.folder / "rebuilt.safetensors"
        try:
            make_rebuilt_state(
                self._store,
                plan.parts,
                SafetensorsWriter(path),
                rule=self.rule,
                dtype=self._request.accumulator_dtype,
                coefficients=plan.coefficients,
                on_progress=lambda _done, _all: self._on_progress(),
            )
            self._manifest = self._blank().model_copy(update=plan.manifest_fields())
            key = layout.blob(self._run_id, self.name, nonce=layout.new_nonce(), file=layout.SHADOW_FILE)
            uploaded = put_path(self._store, key, path, on_read=self._on_progress)
        finally:
            path.unlink(missing_ok=True)
            self._is_loaded = False
        return self._commit(uploaded, uploaded=uploaded, attempt=attempt)

    def write_value(self, path: Path) -> None:
        """Write the averaged weights in the checkpoints' dtypes, BatchNorm statistics pooled.

        Raises:
            CorruptError: a checkpoint of a window cannot be read any more.
        """
        self._accumulation.write_value(path, taken=self._taken)

    def mark_assessed(self, number: int) -> None:
        """An assessment of generation `number` is in the bucket."""
        self._assessed_number = max(number, self._assessed_number or 0)

    def close(self) -> None:
        """Give memory and scratch files back."""
        self._accumulation.close()
        self._is_loaded = False

    def _new_accumulation(self) -> Accumulation:
        dtype = self._request.accumulator_dtype
        if isinstance(self.rule, WindowRule):
            return WindowAccumulation(self._store, self._run_id, self.rule, dtype=dtype)
        return FoldedAccumulation(self._store, self.rule, dtype=dtype, scratch=self._scratch)

    def _blank(self) -> AverageManifest:
        return AverageManifest(
            run_id=self._run_id,
            name=self.name,
            generation=1,
            at=self._clock.now(),
            rule=self.rule.spelling,
            accumulator_dtype=self._request.accumulator_dtype,
            cursor=0,
        )

    def _start_from_newest_inside(self, lineage: Mapping[int, CheckpointCommitted]) -> int:
        """Restore the newest usable generation; returns its number, 0 for a fresh start."""
        for manifest in self._generations.newest_first():
            if manifest.generation > self._newest_number:
                continue  # it came after the look: the log may not have what it is about
            if lineage.keys() >= set(manifest.folded) and self._could_start_from(manifest, lineage):
                return manifest.generation
        self._start_from(None, lineage)
        return 0

    def _could_start_from(self, manifest: AverageManifest, lineage: Mapping[int, CheckpointCommitted]) -> bool:
        """Restore a generation; a truncated or flipped transfer heals, a corrupt object does not."""
        code = ""
        for _ in range(_READS):
            try:
                self._start_from(manifest, lineage)
            except CorruptError as error:
                code = error.code
            else:
                return True
        log.warning("older_generation_used", average=self.name, unreadable=manifest.generation, code=code)
        return False

    def _start_from(self, manifest: AverageManifest | None, lineage: Mapping[int, CheckpointCommitted]) -> None:
        self._accumulation.restore(manifest)
        self._manifest = manifest or self._blank()
        self._taken = [lineage[seq] for seq in self._manifest.folded]
        self._num_unpublished = 0
        self._is_state_stored = True

    def _set_aside(self, pile: str, entry: CheckpointCommitted, *, code: str, message: str) -> None:
        aside = SetAside(seq=entry.seq, step=entry.step, code=code, message=message)
        self._advance(entry, **{pile: [*getattr(self._manifest, pile), aside]})

    def _advance(self, entry: CheckpointCommitted, **changes: object) -> None:
        self._manifest = self._manifest.model_copy(update={**changes, "cursor": entry.seq})
        self._num_unpublished += 1

    def _commit(self, state: FileRef | None, *, uploaded: FileRef | None, attempt: int) -> AverageManifest:
        number = self._newest_number + 1
        stamp = {"generation": number, "at": self._clock.now(), "write_id": new_write_id()}
        manifest = self._manifest.model_copy(update={**stamp, "attempt": attempt, "shadow": state})
        telemetry.WRITTEN_BYTES.inc(uploaded.size_bytes if uploaded else 0)
        try:
            # Blobs are up before this: a crash in between leaves an orphan, never a dangling pointer.
            self._generations.commit(manifest)
        except FencedError:
            self._is_loaded = False
            if uploaded is not None:
                self._store.delete(uploaded.key)
            raise
        self._manifest, self._newest_number = manifest, number
        return manifest

    def _upload_state(self) -> FileRef | None:
        state = self._accumulation.write_state(self._scratch.folder)
        if state is None:
            return None
        key = layout.blob(self._run_id, self.name, nonce=layout.new_nonce(), file=layout.SHADOW_FILE)
        if isinstance(state, bytes):
            return put_file(self._store, key, state)
        try:
            return put_path(self._store, key, state, on_read=self._on_progress)
        finally:
            state.unlink(missing_ok=True)
