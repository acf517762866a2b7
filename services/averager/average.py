"""One average of one run: its accumulators in memory and its generations in the bucket.

Invariant: memory is always the newest readable generation inside the lineage plus the checkpoints taken since,
in log order. So a crash, or losing a generation to another worker, costs a replay and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
import torch

from services.averager.checkpoints import read_file
from wa_core import layout
from wa_core.averaging.policy import AverageView
from wa_core.averaging.rules import parse_lerp_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_file
from wa_core.errors import CorruptError, FencedError, IncompatibleError, InvalidInputError
from wa_core.records import AverageManifest, SetAside, new_write_id
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from wa_core.clock import Clock
    from wa_core.records import Assessment, AverageRequest, CheckpointCommitted, FileRef
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class RunningAverage:
    """Takes checkpoints and publishes generations. `load` must come first, and after every `FencedError`."""

    def __init__(self, store: ObjectStore, run_id: str, request: AverageRequest, *, clock: Clock) -> None:
        self.name = request.name
        self.rule = parse_lerp_rule(request.rule)
        self._store = store
        self._clock = clock
        self._request = request
        self._run_id = run_id
        self._generations = Generations(store, run_id, request.name)
        self._newest_number = 0
        self._manifest: AverageManifest
        self._shadow: ShadowWeights
        self._start_from(None)

    @property
    def view(self) -> AverageView:
        """Where it stands, for the policy."""
        return AverageView(
            name=self.name,
            cursor=self._manifest.cursor,
            folded=frozenset(self._manifest.folded),
            num_unpublished=self._num_unpublished,
            is_dirty=self._is_dirty,
            is_assessed=self._manifest.assessment is not None,
        )

    @property
    def manifest(self) -> AverageManifest:
        """What the next generation will say, or what the newest says when nothing was taken since."""
        return self._manifest

    def value(self) -> dict[str, torch.Tensor]:
        """The averaged weights in the checkpoints' dtypes, BatchNorm statistics pooled over the folds."""
        return self._shadow.value()

    def load(self, lineage: AbstractSet[int]) -> None:
        """Go back to the newest generation that holds nothing from outside `lineage` (log seqs)."""
        numbers = self._generations.numbers()
        self._newest_number = numbers[-1] if numbers else 0
        found = self._start_from_newest_inside(lineage)
        # A newer generation of an abandoned branch is still the newest: publish over it even with no new fold.
        self._is_dirty = found < self._newest_number

    def take(self, entry: CheckpointCommitted, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Fold a checkpoint, or set it aside with the reason; either way it is dealt with, once.

        `tensors` may be None only when the rule does not count the checkpoint's step.
        """
        if not self.rule.counts(entry.step):
            reason = f"the rule {self.rule.spelling} starts at step {self.rule.start_step}"
            return self._set_aside("skipped", entry, code="before_start", message=reason)
        assert tensors is not None, "a checkpoint that counts must be read first"  # noqa: S101  programmer's error
        try:
            self._shadow.fold(tensors, step=entry.step)
        except (CorruptError, IncompatibleError, InvalidInputError) as error:
            return self.reject(entry, error)
        self._advance(entry, folded=[*self._manifest.folded, entry.seq], coefficients=self._shadow.coefficients())
        self._is_shadow_stored = False
        return None

    def reject(
        self, entry: CheckpointCommitted, error: CorruptError | IncompatibleError | InvalidInputError
    ) -> None:
        """Record that a checkpoint cannot be folded, and why; folding goes on with the next."""
        log.warning("rejected", run_id=self._run_id, average=self.name, step=entry.step, code=error.code)
        self._set_aside("rejected", entry, code=error.code, message=error.message)

    def publish(self) -> AverageManifest:
        """Commit what was taken as the next generation.

        Raises:
            FencedError: another averager published that generation first; `load` before going on.
        """
        shadow, uploaded = self._manifest.shadow, None
        if not self._is_shadow_stored:
            tensors, metadata = self._shadow.state()
            shadow = uploaded = self._upload(layout.SHADOW_FILE, serialize(tensors, metadata=metadata))
        return self._commit(self._manifest.model_copy(update={"shadow": shadow}), uploaded=[uploaded])

    def publish_assessed(self, assessment: Assessment, bodies: Mapping[str, bytes]) -> AverageManifest:
        """Commit a generation of the same folds that adds served files (by name) and their assessment.

        Raises:
            FencedError: as for `publish`.
        """
        files = {file: self._upload(file, body) for file, body in bodies.items()}
        manifest = self._manifest.model_copy(update={"assessment": assessment, "files": files})
        return self._commit(manifest, uploaded=[*files.values()])

    def _start_from_newest_inside(self, lineage: AbstractSet[int]) -> int:
        """Restore the newest usable generation; returns its number, 0 for a fresh start."""
        for manifest in self._generations.newest_first():
            if not lineage >= set(manifest.folded):
                continue
            try:
                self._start_from(manifest)
            except CorruptError as error:
                log.warning(
                    "older_generation_used", average=self.name, unreadable=manifest.generation, code=error.code
                )
                continue
            return manifest.generation
        self._start_from(None)
        return 0

    def _start_from(self, manifest: AverageManifest | None) -> None:
        self._num_unpublished = 0
        self._is_dirty = False
        self._is_shadow_stored = True
        self._shadow = ShadowWeights(self.rule, dtype=_DTYPES[self._request.accumulator_dtype])
        self._manifest = manifest or AverageManifest(
            run_id=self._run_id,
            name=self.name,
            generation=1,
            at=self._clock.now(),
            rule=self.rule.spelling,
            accumulator_dtype=self._request.accumulator_dtype,
            cursor=0,
        )
        if manifest and manifest.shadow:
            stored = read_file(self._store, manifest.shadow)
            self._shadow = ShadowWeights.restore(self.rule, stored.tensors, stored.metadata)

    def _set_aside(self, pile: str, entry: CheckpointCommitted, *, code: str, message: str) -> None:
        aside = SetAside(seq=entry.seq, step=entry.step, code=code, message=message)
        self._advance(entry, **{pile: [*getattr(self._manifest, pile), aside]})

    def _advance(self, entry: CheckpointCommitted, **changes: object) -> None:
        # Served files and assessment belong to the folds before this one.
        changes |= {"cursor": entry.seq, "files": {}, "assessment": None}
        self._manifest = self._manifest.model_copy(update=changes)
        self._num_unpublished += 1

    def _upload(self, file: str, body: bytes) -> FileRef:
        key = layout.blob(self._run_id, self.name, nonce=layout.new_nonce(), file=file)
        return put_file(self._store, key, body)

    def _commit(self, manifest: AverageManifest, *, uploaded: list[FileRef | None]) -> AverageManifest:
        number = self._newest_number + 1
        stamp = {"generation": number, "at": self._clock.now(), "write_id": new_write_id()}
        manifest = manifest.model_copy(update=stamp)
        try:
            # Blobs are up before this: a crash in between leaves an orphan, never a dangling pointer.
            self._generations.commit(manifest)
        except FencedError:
            for ref in filter(None, uploaded):
                self._store.delete(ref.key)
            raise
        self._manifest, self._newest_number = manifest, number
        self._num_unpublished, self._is_dirty, self._is_shadow_stored = 0, False, True
        return manifest
