"""`wa gc`: deletes what runs no longer need, or shows what it would, with the reason for every object."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.bucket import open_bucket
from services.cli.console import answer, print_json, print_table
from services.cli.options import AsJson
from wa_core import layout
from wa_core.catalog.retention import Delete, Grace
from wa_core.catalog.runs import list_run_ids
from wa_core.catalog.sweeper import Sweeper
from wa_core.clock import SystemClock

if TYPE_CHECKING:
    from wa_core.catalog.sweeper import SweepReport
    from wa_core.store.base import ObjectStore

_DEFAULT = Grace()


def gc(
    run_id: Annotated[
        str | None, typer.Argument(help="One run; without it, every run.", metavar="[RUN]", show_default=False)
    ] = None,
    *,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would go.")] = False,
    orphan_grace_s: Annotated[
        float, typer.Option("--orphan-grace", min=0, metavar="SECONDS", help="Age of files that no record names.")
    ] = _DEFAULT.orphan_s,
    download_grace_s: Annotated[
        float,
        typer.Option("--download-grace", min=0, metavar="SECONDS", help="How long superseded downloads stay."),
    ] = _DEFAULT.download_s,
    as_json: AsJson = False,
) -> None:
    """Delete what runs no longer need, and say why.

    Works on the bucket itself: that of the WA_* environment, or of the stack of this folder. The averager does the
    same by itself; this is for looking, and for doing it now.

    Example: wa gc RUN --dry-run
    """
    store = open_bucket()
    grace = Grace(orphan_s=orphan_grace_s, download_s=download_grace_s)
    run_ids = [run_id] if run_id else list_run_ids(store)
    reports = [_sweep(store, each, grace=grace, is_dry_run=is_dry_run) for each in run_ids]
    if as_json:
        print_json({"is_dry_run": is_dry_run, "runs": [_as_json(report) for report in reports]})
        return
    for report in reports:
        _show(report, is_dry_run=is_dry_run)


def _sweep(store: ObjectStore, run_id: str, *, grace: Grace, is_dry_run: bool) -> SweepReport:
    sweeper = Sweeper(store, run_id, clock=SystemClock(), grace=grace)
    return sweeper.sweep(is_dry_run=is_dry_run, is_whole=True)


def _as_json(report: SweepReport) -> dict[str, object]:
    deleted = set(report.deleted)
    objects = [
        {
            "key": key,
            "size_bytes": report.sizes[key],
            "verdict": "delete" if isinstance(verdict, Delete) else "keep",
            "reason": verdict.reason,
            "is_deleted": key in deleted,
        }
        for key, verdict in report.verdicts.items()
    ]
    return {"run_id": report.run_id, "freed_bytes": report.freed_bytes, "objects": objects}


def _show(report: SweepReport, *, is_dry_run: bool) -> None:
    """One line for each file of a checkpoint or an average, and one for all records together."""
    prefix = layout.run_prefix(report.run_id)
    rows: list[list[object]] = []
    num_records = 0
    for key, verdict in report.verdicts.items():
        if layout.blob_of(key) is None and layout.checkpoint_of(key) is None:
            num_records += 1
            continue
        does = "delete" if isinstance(verdict, Delete) else "keep"
        rows.append([key.removeprefix(prefix), report.sizes[key], does, verdict.reason])
    if rows:
        print_table(["OBJECT", "BYTES", "", "WHY"], rows)
    counts = Counter(row[2] for row in rows)
    size = sum(report.sizes[key] for key in report.doomed)
    did = f"{counts['delete']} would go" if is_dry_run else f"{len(report.deleted)} deleted"
    answer(
        f"{report.run_id}: {did} ({size} bytes), {counts['keep']} kept; {num_records} records and logs are never "
        f"deleted"
    )
