"""`wa average`: the offline door. Files in, one averaged file out; no service, and no torch for safetensors."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path  # noqa: TC003  Typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from services.cli.average_report import describe_plan, describe_report, print_plan
from services.cli.console import answer, bytes_bar, print_json, say
from services.cli.inputs import find_checkpoints
from services.cli.options import AsJson
from wa_core.averaging.rules import parse_rule
from wa_core.errors import ConfigurationError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from services.cli.merge import Job, Target

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]I?)?B?", re.IGNORECASE)
_MAX_DIGITS = 19
_T = TypeVar("_T")


def average(  # noqa: PLR0913  the command's options, each one a name of its own
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Checkpoints: files (.safetensors, .pt, .ckpt), folders, patterns, s3://bucket/prefix.",
            show_default=False,
        ),
    ],
    *,
    rule: Annotated[
        str,
        typer.Option("--rule", "-r", metavar="RULE", help="Such as swa, ema:half_life=500.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file or folder to write.", show_default=False),
    ] = None,
    file_format: Annotated[
        Literal["safetensors", "pt", "hf"] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="safetensors, pt, or hf, a folder.",
            show_default="by the output's name",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "float64"] | None,
        typer.Option(
            metavar="DTYPE", help="Of the averaged tensors in the output.", show_default="as in the checkpoints"
        ),
    ] = None,
    accumulator_dtype: Annotated[
        Literal["float64", "float32"],
        typer.Option(metavar="DTYPE", help="What is summed in: float64 or float32."),
    ] = "float64",
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Such as 5GB: larger outputs are cut.", show_default="5GB for hf, else none"
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="The step of every source, in order.", show_default="from their names"),
    ] = None,
    total_steps: Annotated[
        int | None, typer.Option(min=1, help="The run's length, for rules that want it.", show_default=False)
    ] = None,
    is_rebuild: Annotated[
        bool, typer.Option("--rebuild", help="The sources are averages: make the rule's average out of them.")
    ] = False,
    max_error: Annotated[
        float, typer.Option(min=0, max=1, help="With --rebuild: the largest predicted error to accept.")
    ] = 0.05,
    latest: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Float tensors that keep their newest value.", show_default=False),
    ] = None,
    digests: Annotated[
        bool | None,
        typer.Option(
            "--digests/--no-digests",
            help="Note the sources' sha256 in the output: one more pass.",
            show_default="for local sources of up to 1 GiB together",
        ),
    ] = None,
    fsync: Annotated[
        bool, typer.Option("--fsync", help="Wait until the output is on the disk: safe from a power cut too.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Stretches worked on at a time.")] = 2,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Average checkpoints that are files, into a file.

    Memory stays small, whatever the model's size. A killed or interrupted command goes on where it
    was when it is given again.

    Example: wa average 'run/step_*.safetensors' --rule ema:half_life=500 -o ema.safetensors

    Example: wa average trainer_output --rule window:last=8,shape=minus_sqrt -o averaged_folder

    Example: wa average s3://bucket/run-7 --rule swa:start_step=1000 --dry-run
    """
    if output is None and not is_dry:
        raise typer.BadParameter("say where to write; or add --dry-run.", param_hint="'--output' / '-o'")
    with _numpy_wanted():
        from services.cli.merge import Job, Target
    shard_bytes = _parse_size(max_shard_size)
    target = None
    if output is not None and not is_dry:
        target = _checked(
            "--output", lambda: Target.settle(output, file_format, max_shard_bytes=shard_bytes, fsync=fsync)
        )
    job = Job(
        found=tuple(_checked("SOURCE", lambda: find_checkpoints(sources, output=output))),
        rule=_checked("--rule", lambda: parse_rule(rule)),
        steps=_parse_steps(steps),
        total_steps=total_steps,
        max_rebuild_error=max_error if is_rebuild else None,
        latest=tuple(latest or ()),
        dtype=dtype,
        accumulator_dtype=accumulator_dtype,
        digests=digests,
        num_threads=threads,
    )
    if target is None:
        _describe(job, as_json=as_json)
    else:
        _merge(job, target, as_json=as_json)


def _describe(job: Job, *, as_json: bool) -> None:
    from services.cli.merge import plan

    found, rebuild = plan(job)
    if as_json:
        print_json(describe_plan(found, num_threads=job.num_threads, rebuild=rebuild))
    else:
        print_plan(found, num_threads=job.num_threads, rebuild=rebuild)


def _merge(job: Job, target: Target, *, as_json: bool) -> None:
    from services.cli.merge import merge

    with bytes_bar(target.path.name) as on_progress:
        report = merge(job, target, on_progress=on_progress)
    if as_json:
        print_json(describe_report(report, num_threads=job.num_threads))
        return
    count = len(report.plan.sources)
    say(f"averaged {count} checkpoint{'s' if count > 1 else ''} with {report.plan.rule} in {report.seconds:.1f} s")
    answer(str(report.files[0] if len(report.files) == 1 else target.index or target.path))


@contextmanager
def _numpy_wanted() -> Iterator[None]:
    # Not at the top: the other commands work on an installation without NumPy, and start without waiting for it.
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"averaging files needs {error.name}; install it with pip install 'weight-averaging[torch]'"
        ) from None


def _checked(place: str, make: Callable[[], _T]) -> _T:
    try:
        return make()
    except InvalidInputError as error:
        if error.code == "output_not_writable":
            raise
        raise typer.BadParameter(error.message, param_hint=f"'{place}'") from None
    except OSError as error:
        named = str(error.filename)[:100]
        raise typer.BadParameter(f"{error.strerror}: {named}", param_hint=f"'{place}'") from None


def _parse_steps(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < _MAX_DIGITS for part in parts):
        raise typer.BadParameter(
            f"{text!r} is no list of whole numbers such as 100,200,300.", param_hint="'--steps'"
        )
    return tuple(int(part) for part in parts)


def _parse_size(text: str | None) -> int | None:
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no size such as 5GB or 500MB.", param_hint="'--max-shard-size'")
    return size
