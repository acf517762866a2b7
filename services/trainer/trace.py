"""The trace of an attempt on its way from the runner over the driver to the worker of rank 0.

The runner hands it to its driver in the environment, the driver to its workers with the training function. This
knows no Ray. Workers run user code: they get an address to send spans to, and no credentials for it.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from services.runtime import tracing
from wa_core.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from services.runtime.settings import Settings
    from services.runtime.spans import Attributes, Span
    from wa_core.records import RunSpec

VARIABLE = "TRACEPARENT"

log = structlog.get_logger(__name__)


def begin_attempt(spec: RunSpec, attempt: int) -> Span:
    """The span of an attempt, in the trace of its run's submission."""
    about: Attributes = {"wa.run_id": spec.run_id, "wa.attempt": attempt}
    return tracing.begin("attempt", parent=spec.traceparent, attributes=about)


@dataclass(frozen=True, slots=True)
class Trace:
    """Which span the attempt is, and the settings that a worker elsewhere needs to send its own."""

    traceparent: str | None
    variables: Mapping[str, str]

    @classmethod
    def of_this_process(cls) -> Trace:
        """What the runner has handed to its driver."""
        known = {name: os.environ[name] for name in tracing.SHARED_VARIABLES if name in os.environ}
        return cls(os.environ.get(VARIABLE), known)

    @contextmanager
    def going_on(self, settings: Settings) -> Iterator[None]:
        """Trace this process for as long as the block takes; a node without the libraries trains all the same."""
        os.environ.update(self.variables)
        try:
            tracing.install("trainer", settings)
        except ConfigurationError as error:
            log.warning("not_traced", error=error.message)
        try:
            yield
        finally:
            tracing.close()
