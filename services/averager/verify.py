"""Recomputes an average from the kept checkpoints and compares it, bit for bit, with what is stored and served.

It trusts nothing but the run log and the checkpoints, whose digests are checked while they are read: not the
accumulators, not the coefficients that a manifest states, not the served file. It knows a bucket and scratch
space; it writes nothing to the bucket. Memory is bounded by blocks, whatever the model's size.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from services.averager.accumulation import FoldedAccumulation, WindowAccumulation
from services.averager.checkpoints import open_checkpoint, open_file
from wa_core import layout
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.sources import open_source
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.streaming import fold_source
from wa_core.averaging.windows import WindowRule
from wa_core.catalog.averages import Generations
from wa_core.catalog.checkpoints import checkpoint_file
from wa_core.catalog.rebuilt_state import make_rebuilt_state
from wa_core.catalog.runs import RunLog, fetch_spec, requested_averages
from wa_core.errors import (
    AverageNotFoundError,
    CorruptError,
    IncompatibleError,
    InvalidInputError,
    NoAverageYetError,
    ObjectNotFoundError,
)
from wa_core.records import CheckpointCommitted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from services.averager.accumulation import Accumulation
    from services.averager.scratch import Scratch
    from wa_core.averaging.files.sources import FilesSource
    from wa_core.clock import Clock
    from wa_core.records import AssessmentRecord, AverageManifest, AverageRequest
    from wa_core.store.base import ObjectStore

_BLOCK_BYTES = 1 << 20
_TOLERANCE = 1e-9
_SHOWN = 5
#: Buffers that recalibration replaces in the served weights.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found equal.

    Attributes:
        run_id: the run.
        name: the average.
        generation: which of its generations.
        steps: of the checkpoints in it, in folding order.
        is_state_equal: whether the stored accumulators were compared, and equal; None where none are stored.
        served_generation: the generation whose served weights were compared, and equal; None where none are yet.
        recalibrated: served buffers that recalibration has replaced, which are not the average's own.
    """

    run_id: str
    name: str
    generation: int
    steps: tuple[int, ...]
    is_state_equal: bool | None
    served_generation: int | None
    recalibrated: tuple[str, ...] = ()


def verify(
    store: ObjectStore,
    run_id: str,
    name: str,
    *,
    clock: Clock,
    scratch: Scratch,
    generation: int | None = None,
    on_checkpoint: Callable[[int, int], None] = lambda _done, _all: None,
) -> Verified:
    """Verify one generation of an average.

    Args:
        store: the bucket.
        run_id: the run.
        name: the average.
        clock: the time source.
        scratch: working space.
        generation: which one; the newest when None.
        on_checkpoint: told how many checkpoints are folded, and of how many.

    Raises:
        NotFoundError: no such run, average or generation.
        NoAverageYetError: the average has no generation with a checkpoint in it.
        CorruptError: it cannot be verified, or it is not what it says it is; code `checkpoint_missing`,
            `checkpoint_changed`, `wrong_coefficients`, `state_differs` or `weights_differ`, and a message
            that names what.
        TransientError: the store is away.
    """
    log = RunLog(store, run_id, clock=clock)
    spec = fetch_spec(store, run_id)
    log.refresh()
    generations = Generations(store, run_id, name)
    manifest = _fetch_manifest(generations, generation, requested_averages(spec, log.entries))
    committed = {entry.seq: entry for entry in log.entries if isinstance(entry, CheckpointCommitted)}
    entries = [committed[seq] for seq in manifest.folded if seq in committed]
    # A rebuilt average began as a sum of what was kept; only what came after that was folded.
    through = manifest.rebuilt.through if manifest.rebuilt else 0
    since = [entry for entry in entries if entry.seq > through]
    if manifest.rebuilt is None:
        _check_coefficients(manifest, entries)
    _check_there(store, run_id, since)
    before = entries[: -len(since) or None]
    with closing(_begin(store, manifest, entries, scratch=scratch)) as accumulation:
        _fold(store, manifest, accumulation, since, before=before, on_checkpoint=on_checkpoint)
        is_state_equal = _compare_state(store, manifest, accumulation, scratch)
        assessment = generations.fetch_assessment(manifest.generation)
        recalibrated: tuple[str, ...] = ()
        if assessment is not None:
            recalibrated = _compare_served(store, assessment, accumulation, entries, scratch)
    return Verified(
        run_id,
        name,
        manifest.generation,
        tuple(entry.step for entry in entries),
        is_state_equal,
        assessment.generation if assessment else None,
        recalibrated,
    )


def _fetch_manifest(
    generations: Generations, number: int | None, requested: Sequence[AverageRequest]
) -> AverageManifest:
    """The generation to verify; the newest when `number` is None."""
    run_id, name = generations.run_id, generations.name
    if name not in (asked := [request.name for request in requested]):
        raise AverageNotFoundError(f"run {run_id} has no average {name!r}; it has {', '.join(asked) or 'none'}")
    manifest = generations.newest() if number is None else generations.fetch(number)
    if manifest is None or not manifest.folded:
        raise NoAverageYetError(f"average {name!r} of run {run_id} holds no checkpoint yet; nothing to verify")
    return manifest


def _check_coefficients(manifest: AverageManifest, entries: Sequence[CheckpointCommitted]) -> None:
    """The stated coefficients must be what the rule gives for exactly these checkpoints."""
    steps, stated = [entry.step for entry in entries], manifest.coefficients
    try:
        expected: Mapping[int, float] = parse_rule(manifest.rule).coefficients(steps)
    except InvalidInputError:  # they do not go forward
        expected = {}
    is_right = (
        len(entries) == len(manifest.folded)
        and stated.keys() == expected.keys() == set(steps)
        and all(abs(stated[step] - expected[step]) <= _TOLERANCE for step in steps)
        and abs(math.fsum(stated.values()) - 1) <= _TOLERANCE
    )
    if not is_right:
        raise CorruptError(
            f"generation {manifest.generation} says it holds the steps {_list(sorted(stated))} with coefficients "
            f"that are not those of the rule {manifest.rule!r} for the checkpoints it names, each counted once",
            code="wrong_coefficients",
        )


def _check_there(store: ObjectStore, run_id: str, entries: Sequence[CheckpointCommitted]) -> None:
    missing = []
    for entry in entries:
        try:
            store.head(checkpoint_file(run_id, entry).key)
        except ObjectNotFoundError:
            missing.append(entry.step)
    if missing:
        raise CorruptError(
            f"it cannot be recomputed: {len(missing)} of its {len(entries)} checkpoints are no longer kept (step "
            f"{_list(missing)}); what is left of the proof is the manifest. Keep checkpoints (no keep_last) in "
            f"runs that have to be verified",
            code="checkpoint_missing",
        )


def _begin(
    store: ObjectStore, manifest: AverageManifest, entries: Sequence[CheckpointCommitted], *, scratch: Scratch
) -> Accumulation:
    """What the average began from: nothing, or the recorded sum of what was kept."""
    rule, dtype, rebuilt = parse_rule(manifest.rule), manifest.accumulator_dtype, manifest.rebuilt
    if isinstance(rule, WindowRule):
        return WindowAccumulation(store, manifest.run_id, rule, dtype=dtype)
    accumulation = FoldedAccumulation(store, rule, dtype=dtype, scratch=scratch)
    if rebuilt is None:
        return accumulation
    weights = _coefficients_at(manifest, entries)
    path = scratch.new_folder("verify-") / "rebuilt.safetensors"
    try:
        make_rebuilt_state(
            store, rebuilt.parts, SafetensorsWriter(path), rule=rule, dtype=dtype, coefficients=weights
        )
    except CorruptError as error:
        raise CorruptError(
            f"it was rebuilt from {len(rebuilt.parts)} files, and one cannot be used any more: {error.message}",
            code="checkpoint_missing" if error.code == "object_missing" else "checkpoint_changed",
        ) from None
    with closing(open_source(path)) as source:
        accumulation.adopt(source)
    return accumulation


def _coefficients_at(manifest: AverageManifest, entries: Sequence[CheckpointCommitted]) -> dict[int, float]:
    """Those of a rebuilt average when it began: what was folded since has scaled them all alike."""
    through = manifest.rebuilt.through if manifest.rebuilt else 0
    begun = {entry.step: manifest.coefficients[entry.step] for entry in entries if entry.seq <= through}
    total = math.fsum(begun.values())
    return {step: value / total for step, value in begun.items()}


def _fold(
    store: ObjectStore,
    manifest: AverageManifest,
    accumulation: Accumulation,
    entries: Sequence[CheckpointCommitted],
    *,
    before: Sequence[CheckpointCommitted],
    on_checkpoint: Callable[[int, int], None],
) -> None:
    for number, entry in enumerate(entries):
        try:
            with closing(open_checkpoint(store, manifest.run_id, entry)) as source:
                accumulation.prepare(source, taken=[*before, *entries[:number]])
                shadows = [] if accumulation.shadow is None else [accumulation.shadow]
                fold_source(source, shadows, step=entry.step, verify=True)
        except (CorruptError, IncompatibleError) as error:
            raise CorruptError(
                f"the checkpoint of step {entry.step} is not the one that was committed: {error.message}",
                code="checkpoint_changed",
            ) from None
        on_checkpoint(number + 1, len(entries))


def _compare_state(
    store: ObjectStore, manifest: AverageManifest, accumulation: Accumulation, scratch: Scratch
) -> bool | None:
    if manifest.shadow is None:
        return None
    folder = scratch.new_folder("verify-")
    state = accumulation.write_state(folder)
    path = folder / "state.safetensors"
    if isinstance(state, bytes):
        path.write_bytes(state)
    try:
        with closing(open_source(path)) as ours, closing(open_file(store, manifest.shadow)) as stored:
            stored.digests()
            different = next(_differences(ours, stored), None)
    except CorruptError as error:
        if error.code == "object_missing":
            return None  # an older generation's, which retention has let go
        raise CorruptError(
            f"the stored accumulators of generation {manifest.generation} are damaged: {error.message}",
            code="state_differs",
        ) from None
    if different is not None:
        raise CorruptError(
            f"the stored accumulators of generation {manifest.generation} differ from the recomputed ones in "
            f"tensor {different!r}; this average is not the one of its checkpoints, fold it again",
            code="state_differs",
        )
    return True


def _compare_served(
    store: ObjectStore,
    record: AssessmentRecord,
    accumulation: Accumulation,
    entries: Sequence[CheckpointCommitted],
    scratch: Scratch,
) -> tuple[str, ...]:
    path = scratch.new_folder("verify-") / "value.safetensors"
    accumulation.write_value(path, taken=entries)
    is_recalibrated = record.assessment.batchnorm.status == "recalibrated"
    try:
        with (
            closing(open_source(path)) as ours,
            closing(open_file(store, record.files[layout.MODEL_FILE])) as served,
        ):
            served.digests()
            different = list(_differences(ours, served))
    except CorruptError as error:
        raise CorruptError(
            f"the served weights of generation {record.generation} are damaged: {error.message}",
            code="weights_differ",
        ) from None
    own = [name for name in different if not (is_recalibrated and name.endswith(_STATISTICS))]
    if own:
        raise CorruptError(
            f"the served weights of generation {record.generation} differ from the recomputed ones in "
            f"{_list(own)}; do not use them",
            code="weights_differ",
        )
    return tuple(different)


def _differences(ours: FilesSource, theirs: FilesSource) -> Iterator[str]:
    """Names of tensors that are not equal to the last bit, aliases by what they stand for."""
    names = {*ours.tensors, *ours.ties, *theirs.tensors, *theirs.ties}
    for name in sorted(names):
        one, other = (source.ties.get(name, name) for source in (ours, theirs))
        left, right = ours.tensors.get(one), theirs.tensors.get(other)
        if left is None or right is None or (left.spec.shape, left.dtype) != (right.spec.shape, right.dtype):
            yield name
            continue
        for begin in range(0, left.size_bytes, _BLOCK_BYTES):
            blocks = np.empty((2, min(_BLOCK_BYTES, left.size_bytes - begin)), np.uint8)
            ours.read_into(one, begin, blocks[0].data)
            theirs.read_into(other, begin, blocks[1].data)
            if not np.array_equal(blocks[0], blocks[1]):
                yield name
                break


def _list(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return shown + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")
