"""One offline merge as `wa average` does it: sources opened, work kept for the next try, the output in its format.

It knows files and `wa_core`'s averaging; nothing of options or of how results are shown. The invariant: a merge
that was killed, interrupted or lost its store leaves what is finished for the same job; any other failure leaves
nothing, and the output's name always stands for a whole output.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from services.cli.console import say
from wa_core.averaging.files.casting import CastingWriter
from wa_core.averaging.files.offline import MergeOptions, average_files
from wa_core.averaging.files.output import leave_to_system, sync_path
from wa_core.averaging.files.paths import FOLDER_SHARD_BYTES, folder_of, format_of
from wa_core.averaging.files.plan import plan_average
from wa_core.averaging.files.rebuild import RebuildWriter, newest_last, plan_sources
from wa_core.averaging.files.staging import Staging
from wa_core.averaging.files.steps import check_steps, find_steps
from wa_core.averaging.files.writers import StagedWriter, find_companions
from wa_core.averaging.tensor_policy import Policy
from wa_core.errors import InvalidInputError, TransientError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from services.cli.inputs import Found
    from wa_core.averaging.files.blocks import AccumulatorDtype
    from wa_core.averaging.files.offline import AverageReport
    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.files.plan import AveragePlan
    from wa_core.averaging.files.sources import FilesSource, Source
    from wa_core.averaging.files.writers import OutputFormat
    from wa_core.averaging.posthoc import RebuildPlan
    from wa_core.averaging.rules import AnyRule

_FORMAT_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to average, and how.

    `steps` are those of `found`, in order; told from names or records if None. With `max_rebuild_error`,
    the sources are averages, out of which the rule's average is rebuilt if its predicted error is at most that.
    """

    found: tuple[Found, ...]
    rule: AnyRule
    steps: tuple[int, ...] | None = None
    total_steps: int | None = None
    max_rebuild_error: float | None = None
    latest: tuple[str, ...] = ()
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    accumulator_dtype: AccumulatorDtype = "float64"
    digests: bool | None = None
    num_threads: int = 2


@dataclass(frozen=True, slots=True)
class Target:
    """Where the average goes; with `fsync` the disk is waited for."""

    path: Path
    file_format: OutputFormat
    max_shard_bytes: int | None
    fsync: bool

    @classmethod
    def settle(
        cls, output: Path, file_format: OutputFormat | None, *, max_shard_bytes: int | None, fsync: bool = False
    ) -> Target:
        """Choose what was left open by the output's name: a torch suffix, none for a folder, else safetensors.

        Raises:
            InvalidInputError: the output's folder is not there, or its name does not tell what it should be.
        """
        if output.name in {"", ".."}:
            raise InvalidInputError(
                f"'{output}' is no name for an output; write for example -o average.safetensors"
            )
        file_format = file_format or format_of(output)
        folder_of(output)
        if max_shard_bytes is None and file_format == "hf":
            max_shard_bytes = FOLDER_SHARD_BYTES
        return cls(output, file_format, max_shard_bytes, fsync)

    @property
    def index(self) -> Path | None:
        """The index that stands for a sharded file."""
        if self.file_format != "safetensors":
            return None
        return self.path.with_name(f"{self.path.stem}.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Work:
    """A job whose sources are open: each with its step, or its position when another average is rebuilt."""

    sources: Sequence[Source]
    steps: Sequence[int]
    rule: AnyRule
    plan: AveragePlan
    rebuild: RebuildPlan | None = None


def plan(job: Job) -> tuple[AveragePlan, RebuildPlan | None]:
    """What `merge` would do; nothing is written, but files in torch's formats are converted to be looked at."""
    with tempfile.TemporaryDirectory(prefix="wa-average-") as folder, _opened(job, Path(folder)) as sources:
        work = _settle(job, sources)
        return work.plan, work.rebuild


def merge(job: Job, target: Target, *, on_progress: Callable[[int, int], None] | None = None) -> AverageReport:
    """Average into `target`, going on from what a killed merge of the same job has left.

    Raises:
        WeightAveragingError: whatever is wrong with sources, job or output.
    """
    staging = Staging(target.path, job=_identity(job, target))
    try:
        if staging.is_resumed:
            say("going on from an interrupted merge")
        return _merge(job, target, staging, on_progress)
    except TransientError:
        staging.close()
        raise
    except KeyboardInterrupt:
        staging.close()
        say("stopped; what is done is kept: the same command goes on from there")
        raise
    except WeightAveragingError:
        staging.remove()
        raise


def _merge(
    job: Job, target: Target, staging: Staging, on_progress: Callable[[int, int], None] | None
) -> AverageReport:
    with _opened(job, staging.folder) as sources:
        work = _settle(job, sources)
        _check_space(target, work.plan)
        return average_files(
            work.sources,
            work.rule,
            _writer(job, target, staging, work),
            steps=work.steps,
            total_steps=job.total_steps,
            latest=job.latest,
            options=MergeOptions(
                accumulator_dtype=job.accumulator_dtype,
                digests=job.digests,
                num_threads=job.num_threads,
                on_progress=on_progress,
            ),
        )


def _writer(job: Job, target: Target, staging: Staging, work: Work) -> Writer:
    newest = work.sources[max(range(len(work.steps)), key=lambda index: work.steps[index])].name
    writer: Writer = StagedWriter(
        staging,
        file_format=target.file_format,
        max_shard_bytes=target.max_shard_bytes,
        companions=find_companions(Path(newest)) if target.file_format == "hf" else [],
        sync=sync_path if target.fsync else leave_to_system,
    )
    if job.dtype is not None:
        writer = CastingWriter(writer, dtype=_FORMAT_DTYPES[job.dtype], averaged=_averaged(work.plan))
    return RebuildWriter(writer, work.rebuild) if work.rebuild else writer


@contextmanager
def _opened(job: Job, folder: Path) -> Iterator[list[FilesSource]]:
    with ExitStack() as stack:
        sources = []
        for number, found in enumerate(job.found):
            sources.append(found.open(folder / f"source-{number:05d}.safetensors"))
            stack.callback(sources[-1].close)
        yield sources


def _settle(job: Job, sources: Sequence[FilesSource]) -> Work:
    if job.max_rebuild_error is None:
        steps = _steps(job, sources)
        planned = plan_average(sources, job.rule, steps=steps, total_steps=job.total_steps, latest=job.latest)
        return Work(sources, steps, job.rule, planned)
    ordered = newest_last(sources)
    rebuild, weights = plan_sources(
        ordered, job.rule, total_steps=job.total_steps, max_error=job.max_rebuild_error
    )
    positions = range(len(ordered))
    # A rule in all that a merge asks of one.
    rule = cast("AnyRule", weights)
    return Work(ordered, positions, rule, plan_average(ordered, rule, steps=positions, latest=job.latest), rebuild)


def _steps(job: Job, sources: Sequence[FilesSource]) -> list[int]:
    names = [source.name for source in sources]
    if job.steps is None:
        return find_steps(names, [source.step for source in sources])
    check_steps(names, job.steps)
    return list(job.steps)


def _averaged(planned: AveragePlan) -> set[str]:
    return {name for name, decision in planned.decisions.items() if decision.policy is not Policy.LATEST}


def _check_space(target: Target, planned: AveragePlan) -> None:
    copies = 2 if target.file_format == "pt" else 1
    free = shutil.disk_usage(target.path.resolve().parent).free
    if planned.write_bytes * copies > free:
        raise InvalidInputError(
            f"{target.path} needs {planned.write_bytes * copies} bytes, but {free} are free on its disk; free the "
            f"space, or choose another place with -o",
            code="output_not_writable",
        )


def _identity(job: Job, target: Target) -> list[object]:
    """Everything that decides the output's bytes."""
    return [
        [[found.name, found.stamp] for found in job.found],
        [job.rule.spelling, job.steps, job.total_steps, job.max_rebuild_error, job.latest],
        [job.dtype, job.accumulator_dtype, job.digests],
        [target.file_format, target.max_shard_bytes],
    ]
