"""The offline merge: one average of checkpoints that are all there, written as one output.

It goes tile by tile through all sources and keeps no accumulator, so memory is a few tiles, whatever the model's
size. It knows sources, a rule and a writer; no service and no torch. The invariant: every element of the output is
the same function of the same elements of the sources, so the bits depend neither on the tiles' size nor on the
number of threads; and nothing is visible before everything was found sound.
"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from wa_core.averaging.files.paths import folder_of, format_of, opened_output, opened_path
from wa_core.averaging.files.plan import AveragePlan, plan_average
from wa_core.averaging.files.tiles import Merge
from wa_core.averaging.rules import parse_rule
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from wa_core.averaging.files.blocks import AccumulatorDtype
    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.files.sources import Source
    from wa_core.averaging.rules import AnyRule

# Elements of a tile. Local files: small enough for the processor's cache, and so many that Python takes little of
# the time (half and twice as many took 5 to 15 % more). Stores: few large requests.
_LOCAL_TILE = 1 << 18
_REMOTE_TILE = 1 << 21
# Sources up to this size together, on this machine, are hashed unless told otherwise: it takes under a second.
_AUTO_DIGEST_BYTES = 1 << 30


class TorchDtype(Protocol):
    """What `torch.float64` is to who does not import torch: something whose text is its name."""

    @property
    def is_floating_point(self) -> bool:
        """Whether its numbers are floating-point numbers."""
        ...


@dataclass(frozen=True, slots=True)
class AverageReport:
    """What `average_files` did.

    Attributes:
        plan: the sources with their steps, coefficients and digests, and what became of each tensor.
        files: what was written.
        seconds: how long it took.
    """

    plan: AveragePlan
    files: tuple[Path, ...]
    seconds: float

    @property
    def coefficients(self) -> dict[int, float]:
        """Step -> the part of that checkpoint in the average; they sum to 1."""
        return self.plan.coefficients


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """How `average_files` works; none of these changes a bit of the average but `accumulator_dtype`.

    Attributes:
        accumulator_dtype: what is summed in; float64 tensors are always summed in float64.
        digests: note the SHA-256 of every source file, which takes one more pass; False: of none; None: of all
            when they are local and at most 1 GiB together, or else of those that have records. Recorded digests
            are checked in any case.
        fsync: wait until the output is on the disk, where `average_files` makes it; without, a kill cannot harm it
            but a power cut can.
        metadata: more texts for the output's header.
        num_threads: tiles in work at a time.
        tile_elements: the largest tile; chosen by where the sources are when None.
        on_progress: called with bytes read and bytes in all, after every tile, from any thread.
    """

    accumulator_dtype: AccumulatorDtype = "float64"
    digests: bool | None = None
    fsync: bool = False
    metadata: Mapping[str, str] | None = None
    num_threads: int = 2
    tile_elements: int | None = None
    on_progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.accumulator_dtype not in ("float64", "float32"):
            raise InvalidInputError(f"accumulator_dtype is {self.accumulator_dtype!r}; use 'float64' or 'float32'")
        if self.num_threads < 1 or (self.tile_elements is not None and self.tile_elements < 1):
            raise InvalidInputError("num_threads and tile_elements must be 1 or more")


def average_files(
    sources: Iterable[Source | str | os.PathLike[str]] | str | os.PathLike[str],
    rule: AnyRule | str,
    out: str | os.PathLike[str] | Writer,
    *,
    steps: Sequence[int] | None = None,
    total_steps: int | None = None,
    latest: Iterable[str] = (),
    accumulator_dtype: AccumulatorDtype | TorchDtype | None = None,
    options: MergeOptions | None = None,
) -> AverageReport:
    """Average checkpoints into one file.

    Args:
        sources: paths of any format that `wa average` reads, which are opened and closed here, or open sources,
            which stay open.
        rule: how much each counts; or its spelling, such as ``ema:half_life=500``.
        out: a path, whose name decides the format: ``.safetensors``, ``.pt``, or without a suffix a Hugging Face
            folder; or a writer.
        steps: one for each source; when not given, those that the sources know, or else their names tell.
        total_steps: the run's length, for rules that need it.
        latest: shell patterns of float tensors that keep their newest value instead.
        accumulator_dtype: what is summed in, ``"float64"`` or ``"float32"``, or torch's name of it; that of
            `options` when None.
        options: how to work.

    Raises:
        InvalidInputError, IncompatibleError: as for `plan_average`; or the output cannot be written.
        CorruptError: a source is damaged or has NaN or infinity (`not_finite`); nothing was written.
        StoreUnavailableError: a source cannot be reached; nothing was written.
    """
    started, options = time.monotonic(), options or MergeOptions()
    if accumulator_dtype is not None:
        name = cast("AccumulatorDtype", str(accumulator_dtype).removeprefix("torch."))
        options = replace(options, accumulator_dtype=name)
    if isinstance(rule, str):
        rule = parse_rule(rule)
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    scratch = _check_out(Path(out), given) if isinstance(out, str | os.PathLike) else None
    with ExitStack() as stack:
        opened = [_open(source, stack, scratch) for source in given]
        plan = plan_average(opened, rule, steps=steps, total_steps=total_steps, latest=latest)
        by_name = {source.name: source for source in opened}
        used = [by_name[use.name] for use in plan.sources]
        if isinstance(out, str | os.PathLike):
            out = stack.enter_context(opened_output(Path(out), newest=used[-1].name, fsync=options.fsync))
        plan, files = _write(plan, used, out, options)
    return AverageReport(plan, files, seconds=time.monotonic() - started)


def _open(source: Source | str | os.PathLike[str], stack: ExitStack, scratch: Path | None) -> Source:
    if not isinstance(source, str | os.PathLike):
        return source
    return stack.enter_context(opened_path(os.fspath(source), scratch=scratch))


def _check_out(out: Path, sources: Iterable[Source | str | os.PathLike[str]]) -> Path:
    """The folder that the output will be in, if it can be written."""
    paths = {Path(source).resolve() for source in sources if isinstance(source, str | os.PathLike)}
    if paths & {out.resolve(), out.resolve().parent}:
        raise InvalidInputError(
            f"{out} is one of the checkpoints to average, or inside one; choose another name for the output",
            code="output",
        )
    if out.is_dir() and any(out.iterdir()):
        raise InvalidInputError(f"{out} is a folder; choose another name for the output", code="output")
    format_of(out)
    return folder_of(out)


def _write(
    plan: AveragePlan, used: Sequence[Source], writer: Writer, options: MergeOptions
) -> tuple[AveragePlan, tuple[Path, ...]]:
    hashed = [source.has_records or _notes_all(used, options) for source in used]
    noted = [is_hashed and options.digests is not False for is_hashed in hashed]
    blank = [dict.fromkeys(source.files, "0" * 64) for source in used]
    try:
        writer.begin(plan.tensors, ties=plan.ties, metadata=_texts(_with_digests(plan, blank, noted), options))
        with _digesting(used, hashed, num_threads=options.num_threads) as finish:
            _merge(plan, used, writer, options)
            plan = _with_digests(plan, finish(), noted)
        return plan, writer.commit(_texts(plan, options))
    except BaseException:
        writer.abort()
        raise


def _notes_all(used: Sequence[Source], options: MergeOptions) -> bool:
    if options.digests is not None:
        return options.digests
    is_local = not any(source.is_remote for source in used)
    return is_local and sum(source.size_bytes for source in used) <= _AUTO_DIGEST_BYTES


def _merge(plan: AveragePlan, used: Sequence[Source], writer: Writer, options: MergeOptions) -> None:
    chosen = _REMOTE_TILE if any(source.is_remote for source in used) else _LOCAL_TILE
    Merge(
        used,
        coefficients=[use.coefficient for use in plan.sources],
        tensors=plan.tensors,
        decisions=plan.decisions,
        writer=writer,
        accumulator=options.accumulator_dtype,
        tile_elements=options.tile_elements or chosen,
        on_read=_counter(plan.read_bytes, options.on_progress),
    ).run(num_threads=options.num_threads)


def _counter(total_bytes: int, on_progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    if on_progress is None:
        return lambda _: None
    lock, done = threading.Lock(), 0

    def on_read(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            on_progress(done, total_bytes)

    return on_read


@contextmanager
def _digesting(
    sources: Sequence[Source], hashed: Sequence[bool], *, num_threads: int
) -> Iterator[Callable[[], list[dict[str, str]]]]:
    # Beside the merge, in threads of their own: hashing lets go of the interpreter's lock.
    with ThreadPoolExecutor(num_threads, thread_name_prefix="digest") as pool:
        waiting = [
            pool.submit(source.digests if is_hashed else dict)
            for source, is_hashed in zip(sources, hashed, strict=True)
        ]
        try:
            yield lambda: [digests.result() for digests in waiting]
        finally:
            pool.shutdown(cancel_futures=True)


def _with_digests(plan: AveragePlan, digests: Sequence[Mapping[str, str]], noted: Sequence[bool]) -> AveragePlan:
    uses = [
        replace(use, sha256=sha256 if is_noted else {})
        for use, sha256, is_noted in zip(plan.sources, digests, noted, strict=True)
    ]
    return replace(plan, sources=tuple(uses))


def _texts(plan: AveragePlan, options: MergeOptions) -> dict[str, str]:
    """What the output says of itself. No time and no folder: the same average gives the same file."""
    sources = [
        {
            "name": use.name.rstrip("/").rpartition("/")[2],
            "step": use.step,
            "coefficient": use.coefficient,
            "size_bytes": use.size_bytes,
            **({"sha256": dict(use.sha256)} if use.sha256 else {}),
        }
        for use in plan.sources
    ]
    return {
        **(options.metadata or {}),
        "format": "pt",
        "weights": "averaged",
        "rule": plan.rule,
        "n_averaged": str(len(plan.sources)),
        "first_step": str(plan.sources[0].step),
        "last_step": str(plan.sources[-1].step),
        "accumulator_dtype": options.accumulator_dtype,
        "sources": json.dumps(sources, separators=(",", ":")),
    }
