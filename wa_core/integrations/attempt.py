"""What every adapter does with a run: opens it where it is told of steps, offers what is due, and ends it.

It knows runs and steps; no training library. The invariant: of the processes that train together, only the main
one has a run; and a run that was opened is finished or failed, once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from wa_core.publisher import OwnRun, Restored


class Attempt:
    """One training by a library's own loop.

    Args:
        open_run: makes the run, by `register_run` or `resume_run`; called on the main process alone.
        every_steps: how many optimizer steps lie between checkpoints.

    Raises:
        ValueError: `every_steps` is less than 1.
    """

    def __init__(self, open_run: Callable[[], OwnRun], *, every_steps: int) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}; a checkpoint needs at least 1 step before it")
        self.run: OwnRun | None = None
        self._open_run = open_run
        self._every_steps = every_steps
        self._steps_before = 0
        self._offered_at = 0

    @property
    def is_stop_wanted(self) -> bool:
        """Whether training should end at its next step; True on the main process only."""
        return self.run is not None and self.run.is_stop_wanted

    def begin(self, *, is_main: bool) -> Restored | None:
        """Open the run; what it resumes from, if anything, must be loaded by every process."""
        if is_main and self.run is None:
            self.run = self._open_run()
        restored = self.run.restored if self.run else None
        self._steps_before = self._offered_at = restored.step if restored else 0
        return restored

    def is_due(self, step: int, *, is_last: bool = False) -> bool:
        """Whether a checkpoint is to be taken after `step` optimizer steps of this process."""
        total = step + self._steps_before
        return total > self._offered_at and (is_last or total % self._every_steps == 0)

    def report(self, step: int, *, metrics: Mapping[str, float]) -> None:
        """Say where training stands."""
        if self.run is not None:
            self.run.report(step + self._steps_before, metrics=metrics)

    def offer(self, step: int, state: Mapping[str, Tensor], **about: Any) -> None:  # noqa: ANN401  as `OwnRun.offer`
        """Take a checkpoint; on other processes than the main one this only counts."""
        self._offered_at = step + self._steps_before
        if self.run is not None:
            self.run.offer(self._offered_at, state, **about)

    def finish(self) -> None:
        """Training has ended well."""
        if self.run is not None:
            self.run.finish()

    def fail(self, error: BaseException) -> None:
        """Training has ended with an exception."""
        if self.run is not None:
            self.run.fail(error)
