"""Why an attempt failed, in the form in which a driver leaves it to its runner: a small file.

A driver that dies without leaving one (SIGKILL, out of memory) has failed with `DRIVER_DIED`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from wa_core.errors import WeightAveragingError
from wa_core.records import Record

if TYPE_CHECKING:
    from pathlib import Path

DRIVER_DIED = "driver_died"
INSUFFICIENT_RESOURCES = "insufficient_resources"
INTERRUPTED = "interrupted"
NODES_LOST = "nodes_lost"
QUEUE_DEADLINE = "queue_deadline"
RUN_DEADLINE = "run_deadline"
RUNNER_LOST = "runner_lost"
RUNNER_STOPPED = "runner_stopped"
RAY_UNAVAILABLE = "ray_unavailable"
STALLED = "stalled"
WORKER_DIED = "worker_died"

# A checkpoint that an attempt was to grow from is damaged or gone; the one before it may be sound.
SPOILED = frozenset(
    {"compressed_archive", "corrupt", "digest_mismatch", "expanded_tensor", "object_missing", "unsafe_pickle"}
)
# Trying these again would only fail again.
HOPELESS = frozenset(
    {
        "invalid_config",
        "unknown_recipe",
        "recipe_not_allowed",
        "package_not_found",
        "invalid_package",
        "module_name_taken",
        "invalid_input",
        "incompatible",
    }
)
# All reasons that this code gives; that of a recipe's own error may be any other.
REASONS = frozenset(
    {
        *SPOILED,
        *HOPELESS,
        *(DRIVER_DIED, INSUFFICIENT_RESOURCES, INTERRUPTED, QUEUE_DEADLINE, RUN_DEADLINE, RUNNER_LOST),
        *(NODES_LOST, RUNNER_STOPPED, RAY_UNAVAILABLE, STALLED, WORKER_DIED),
        *("conflict", "configuration", "driver_error", "fenced", "peer_lost", "ray_failed", "stopped_early"),
        *("storage_auth", "store_unavailable", "transient", "user_code"),
    }
)


class Failure(Record):
    """A stable `reason` and a `message` for people, in one line."""

    reason: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The failure that an error means."""
        if isinstance(error, WeightAveragingError):
            return cls(reason=error.code, message=_one_line(error.message))
        if isinstance(error, KeyboardInterrupt | SystemExit):  # Ray leaves by the latter after SIGINT
            return cls(reason=INTERRUPTED, message="the driver was interrupted")
        return cls(reason="driver_error", message=_one_line(f"{type(error).__name__}: {error}"))

    def leave(self, path: Path) -> None:
        """Write it for the runner."""
        path.write_text(self.model_dump_json())

    @classmethod
    def found(cls, path: Path, *, exit_code: int) -> Failure:
        """What the driver left, or that it died without a word."""
        try:
            return cls.model_validate_json(path.read_text())
        except (OSError, ValidationError):
            return cls(
                reason=DRIVER_DIED, message=f"the driver died with exit code {exit_code}; a new one takes over"
            )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
