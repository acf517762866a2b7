"""What an averager counts and times, for Prometheus. No run or average is a label: their number has no bound."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

FOLDS = Counter("wa_averager_folds", "Checkpoints folded into averages.")
REJECTED = Counter("wa_averager_rejected", "Checkpoints that an average rejected as unsound.")
CONFLICTS = Counter("wa_averager_conflicts", "Generations that another averager published first.")
READ_BYTES = Counter("wa_averager_read_bytes", "Bytes of checkpoints read.")
WRITTEN_BYTES = Counter("wa_averager_written_bytes", "Bytes of accumulators and served files written.")
FOLD_SECONDS = Histogram("wa_averager_fold_seconds", "Reading one checkpoint and folding it into its averages.")
ASSESS_SECONDS = Histogram(
    "wa_averager_assess_seconds",
    "Assessing the averages of one run.",
    buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
CHECKPOINTS_BEHIND = Gauge(
    "wa_averager_checkpoints_behind", "Checkpoints that the slowest average lacks, all runs."
)
SECONDS_BEHIND = Gauge("wa_averager_seconds_behind", "Age of the oldest checkpoint that an average lacks.")
RUNS_HELD = Gauge("wa_averager_runs_held", "Runs that this averager works on.")
