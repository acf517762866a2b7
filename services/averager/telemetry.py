"""What an averager counts and times, for Prometheus. No run or average is a label: their number has no bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from wa_core.records import CheckpointCommitted

FOLDS = Counter("wa_averager_folds", "Checkpoints folded into averages.")
REJECTED = Counter("wa_averager_rejected", "Checkpoints that an average rejected as unsound.", ["code"])
CONFLICTS = Counter("wa_averager_conflicts", "Generations that another averager published first.")
READ_BYTES = Counter("wa_averager_read_bytes", "Bytes of checkpoints read.")
WRITTEN_BYTES = Counter("wa_averager_written_bytes", "Bytes of accumulators and served files written.")
FOLD_SECONDS = Histogram("wa_averager_fold_seconds", "Reading one checkpoint and folding it into its averages.")
ASSESS_SECONDS = Histogram(
    "wa_averager_assess_seconds",
    "Assessing the averages of one run.",
    buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
LAG_SECONDS = Histogram(
    "wa_averager_lag_seconds",
    "From the commit of a checkpoint to a generation that holds it (folded), and to its download (served).",
    ["stage"],
    buckets=(0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800),
)
CHECKPOINTS_BEHIND = Gauge(
    "wa_averager_behind_checkpoints", "Checkpoints that the slowest averages of the held runs lack: the queue."
)
SECONDS_BEHIND = Gauge("wa_averager_behind_seconds", "Age of the oldest checkpoint that an average lacks.")
RUNS_HELD = Gauge("wa_averager_runs_held", "Runs that this averager works on.")


def observe_lag(stage: str, lineage: Sequence[CheckpointCommitted], *, step: int | None, now: datetime) -> None:
    """Note how long ago the checkpoint of `step`, the newest in an average, was committed.

    Args:
        stage: ``folded`` or ``served``.
        lineage: the run's checkpoints.
        step: None when nothing is in the average.
        now: the time; clocks of two machines differ, so what seems to be in the future counts as now.
    """
    committed = next((entry.at for entry in reversed(lineage) if entry.step == step), None)
    if committed is not None:
        LAG_SECONDS.labels(stage).observe(max(0.0, (now - committed).total_seconds()))
