"""Watches a run's log from beside the training loop: does its owner want it to stop, has an attempt taken over?

The loop itself reads only flags, so a slow store never slows a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.catalog.runs import RunLog
from wa_core.errors import FencedError

if TYPE_CHECKING:
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore


class RunWatch:
    """What the run log says about whether an attempt should go on."""

    def __init__(self, store: ObjectStore, run_id: str, *, attempt: int, clock: Clock) -> None:
        self._log = RunLog(store, run_id, clock=clock)
        self._attempt = attempt
        self._is_unwanted = False
        self._is_fenced = False

    @property
    def is_stop_wanted(self) -> bool:
        """Whether the attempt should end at the next step."""
        return self._is_unwanted or self._is_fenced

    def look(self) -> None:
        """Read what is new in the log.

        Raises:
            TransientError: the store is away; the flags keep their values.
        """
        self._log.refresh()
        self._is_unwanted = self._log.desired_state != "succeeded"
        self._is_fenced = self._log.is_past(self._attempt)

    def check_fence(self) -> None:
        """Stop an attempt that is no longer the run's.

        Raises:
            FencedError: a newer attempt has started or is to start, or the run has ended.
        """
        if self._is_fenced:
            raise FencedError(
                f"run {self._log.run_id}: attempt {self._attempt} is over; the run is {self._log.state} "
                f"in attempt {self._log.attempt}"
            )
