"""What an averager tells Prometheus of the checkpoints that it was given."""

from __future__ import annotations

from datetime import timedelta

from prometheus_client import REGISTRY

from services.averager import telemetry
from support.averaging import averager, run_until_idle
from support.runs import HandmadeRun, random_weights
from wa_core.store.memory import MemoryStore


def value(name: str, **labels: str) -> float:
    """A metric now."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_lag_and_rejections_are_told() -> None:
    """From commit to folded and to served is timed once per generation; a rejection is counted by its code."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"swa": "swa"})
    lag = "wa_averager_lag_seconds_count"
    before = value(lag, stage="folded"), value(lag, stage="served")
    rejected = value("wa_averager_rejected_total", code="not_finite")
    worker = averager(store)

    run.checkpoint(10, random_weights(1))
    run_until_idle(worker)
    spoiled = random_weights(2)
    next(iter(spoiled.values())).view(-1)[0] = float("nan")
    run.checkpoint(20, spoiled)
    run_until_idle(worker)

    assert value(lag, stage="folded") - before[0] == 2
    assert value(lag, stage="served") - before[1] >= 1
    assert value("wa_averager_rejected_total", code="not_finite") - rejected == 1
    assert value("wa_averager_behind_checkpoints") == 0


def test_a_clock_that_is_behind_makes_no_negative_lag() -> None:
    """The committing machine's clock may be ahead of ours; such a checkpoint counts as just committed."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"swa": "swa"})
    run.checkpoint(10, random_weights(1))
    run.log.refresh()
    committed = run.log.lineage[0].at
    assert committed is not None
    before = value("wa_averager_lag_seconds_sum", stage="folded")

    yesterday = committed - timedelta(days=1)
    telemetry.observe_lag("folded", run.log.lineage, step=10, now=yesterday)
    telemetry.observe_lag("folded", run.log.lineage, step=None, now=yesterday)

    assert value("wa_averager_lag_seconds_sum", stage="folded") == before
