"""Carries a rebuild out: the parts' files in the bucket, summed into the state of the average that was added.

It knows the store and a plan (`wa_core.catalog.rebuild`); the arithmetic is that of
`wa_core.averaging.files.states`. The invariant: every part is what its record says, or nothing is written.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from wa_core.averaging.files.parts import ObjectPart
from wa_core.averaging.files.sources import FilesSource
from wa_core.averaging.files.states import sum_states
from wa_core.errors import CorruptError, ObjectNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from wa_core.averaging.files.blocks import AccumulatorDtype
    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.rules import Rule
    from wa_core.records import FileRef, RebuiltPart
    from wa_core.store.base import ObjectStore


def make_rebuilt_state(
    store: ObjectStore,
    parts: Sequence[RebuiltPart],
    out: Writer,
    *,
    rule: Rule,
    dtype: AccumulatorDtype,
    coefficients: Mapping[int, float],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the state that `StreamedShadow.restore` goes on from.

    Args:
        store: the bucket.
        parts: of a `Rebuild`, or as a manifest records them.
        out: takes the state.
        rule: of the average.
        dtype: of its accumulators.
        coefficients: of the `Rebuild`.
        on_progress: called with bytes summed and bytes in all, from any thread; what it raises ends the work.

    Raises:
        CorruptError: a part is gone (`object_missing`: plan anew) or damaged; nothing was written.
        IncompatibleError: parts of several architectures, or a sum that does not fit; nothing was written.
        TransientError: the store is away; nothing was written.
    """
    with ExitStack() as stack:
        opened = [(stack.enter_context(closing(_open(store, part.file))), part.weight) for part in parts]
        sum_states(opened, out, rule=rule, dtype=dtype, coefficients=coefficients, on_progress=on_progress)


def _open(store: ObjectStore, file: FileRef) -> FilesSource:
    try:
        part = ObjectPart(store, file.key, size_bytes=file.size_bytes, sha256=file.sha256)
    except ObjectNotFoundError:
        raise CorruptError(f"{file.key} is recorded but absent from the bucket", code="object_missing") from None
    return FilesSource(file.key, [part])
