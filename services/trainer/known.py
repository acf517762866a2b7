"""What a runner has read of runs: their logs and specs, kept between ticks so that only what is new is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.catalog.runs import RunLog, fetch_spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from wa_core.clock import Clock
    from wa_core.records import RunSpec
    from wa_core.store.base import ObjectStore

_PATIENCE_S = 5.0  # a tick must not outlast the time to stop; the next one reads the log again


class KnownRuns:
    """Logs and specs by run id; a log is as fresh as its last `refresh`."""

    def __init__(self, store: ObjectStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._logs: dict[str, RunLog] = {}
        self._specs: dict[str, RunSpec] = {}

    @property
    def logs(self) -> Mapping[str, RunLog]:
        """Those that were asked for, and not forgotten since."""
        return self._logs

    def log_of(self, run_id: str) -> RunLog:
        """The run's log, as it was last read."""
        if run_id not in self._logs:
            self._logs[run_id] = RunLog(self._store, run_id, clock=self._clock, patience_s=_PATIENCE_S)
        return self._logs[run_id]

    def spec_of(self, run_id: str) -> RunSpec:
        """The run's spec, which never changes.

        Raises:
            RunNotFoundError, CorruptError, TransientError: as for `fetch_spec`.
        """
        if run_id not in self._specs:
            self._specs[run_id] = fetch_spec(self._store, run_id)
        return self._specs[run_id]

    def forget_others(self, active: AbstractSet[str], *, held: AbstractSet[str]) -> None:
        """Keep what belongs to active runs, and the specs of those that are held."""
        self._logs = {run_id: run_log for run_id, run_log in self._logs.items() if run_id in active}
        self._specs = {run_id: spec for run_id, spec in self._specs.items() if run_id in active | held}
