"""The offline merge: one average of checkpoints that are all there, written as one output.

It goes tile by tile through all sources and keeps no accumulator, so memory is a few tiles, whatever the model's
size. It knows sources, a rule and a writer; no service and no torch. The invariant: every element of the output is
the same function of the same elements of the sources, computed in the sources' order, so that the bits depend
neither on the tiles' size nor on the number of threads; and nothing is visible before everything was found sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from wa_core.averaging.output import Writer
    from wa_core.averaging.rules import Rule
    from wa_core.averaging.sources import Source, StoredTensor
    from wa_core.averaging.tensor_policy import Decision

AccumulatorDtype = Literal["float64", "float32"]


@dataclass(frozen=True, slots=True)
class SourceUse:
    """One checkpoint's part in an average. `sha256` maps its files to digests; empty when not asked for."""

    name: str
    step: int
    coefficient: float
    size_bytes: int
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class AveragePlan:
    """What an average would be, before a byte of data is read: the dry run.

    `sources` take part, in the order of their steps; `left_out` do not (name -> why). `tensors` are those of the
    output in file order, `decisions` says what becomes of each. `memory_bytes` is what the tiles will take.
    """

    rule: str
    sources: tuple[SourceUse, ...]
    left_out: Mapping[str, str]
    tensors: tuple[StoredTensor, ...]
    ties: Mapping[str, str]
    decisions: Mapping[str, Decision]
    read_bytes: int
    write_bytes: int
    memory_bytes: int

    @property
    def coefficients(self) -> dict[int, float]:
        """Step -> coefficient, in the order of the steps."""
        return {use.step: use.coefficient for use in self.sources}


@dataclass(frozen=True, slots=True)
class AverageReport:
    """What was written: the plan, now with digests, the files, and how long it took."""

    plan: AveragePlan
    files: tuple[Path, ...]
    seconds: float


def plan_average(
    sources: Sequence[Source],
    rule: Rule,
    *,
    total_steps: int | None = None,
    latest: Iterable[str] = (),
) -> AveragePlan:
    """Decide everything that headers decide, and refuse what cannot be averaged.

    Args:
        sources: open checkpoints, in any order; each needs a step of its own.
        rule: how much each counts.
        total_steps: the run's length, for rules that need it.
        latest: shell patterns of float tensors that keep their newest value instead.

    Raises:
        InvalidInputError: no source counts, or a step is missing or there twice.
        IncompatibleError: tensors differ between sources, or one cannot be averaged (`unsupported_dtype`).
    """
    raise NotImplementedError


def average_files(
    sources: Sequence[Source | str | os.PathLike[str]],
    rule: Rule,
    out: str | os.PathLike[str] | Writer,
    *,
    accumulator_dtype: AccumulatorDtype = "float64",
    total_steps: int | None = None,
    latest: Iterable[str] = (),
    digests: bool = False,
    metadata: Mapping[str, str] | None = None,
    num_threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> AverageReport:
    """Average checkpoints into one file.

    Args:
        sources: paths, which are opened and closed here, or open sources, which stay open.
        rule: how much each counts.
        out: a path for one safetensors file, or a writer.
        accumulator_dtype: what is summed in; float64 tensors are always summed in float64.
        total_steps: the run's length, for rules that need it.
        latest: shell patterns of float tensors that keep their newest value instead.
        digests: note the SHA-256 of every source file (costs one more pass; known digests are always checked).
        metadata: more texts for the output's header.
        num_threads: tiles in work at a time.
        on_progress: called with bytes read and bytes in all, now and then, from any thread.

    Raises:
        InvalidInputError, IncompatibleError: as for `plan_average`; or the output cannot be written.
        CorruptError: a source is damaged or has NaN or infinity (`not_finite`); nothing was written.
        StoreUnavailableError: a source cannot be reached; nothing was written.
    """
    raise NotImplementedError
