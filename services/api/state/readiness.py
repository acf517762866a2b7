"""Whether this replica can serve: the store keeps its promises (asked once), and answers now (asked each time).

The probe writes, races and reads, so it runs once; what it found is kept. A store that is away while it runs is
probed again later; one that breaks a promise is never trusted again by this process.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import structlog

from services.api.problems import RETRY_AFTER_S, HttpProblem
from wa_core import layout
from wa_core.errors import ConfigurationError, ObjectNotFoundError, UnsafeStoreError, WeightAveragingError
from wa_core.store.probe import probe_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from wa_core.store.base import ObjectStore
    from wa_core.store.probe import ProbeReport

log = structlog.get_logger(__name__)

_PROBE_AGAIN_S = 2.0


class Readiness:
    """What is known of the store.

    Args:
        store: the store itself, for the probe, which wants to see every answer.
        brief: the store as the routes use it, for asking whether it answers now.
        on_unsafe: told when the store turns out not to be trusted.
    """

    def __init__(self, store: ObjectStore, brief: ObjectStore, *, on_unsafe: Callable[[str], None]) -> None:
        self._store = store
        self._brief = brief
        self._on_unsafe = on_unsafe
        self._report: ProbeReport | None = None
        self._fault: WeightAveragingError | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Probe in the background, until it is known whether the store can be trusted."""
        threading.Thread(target=self._probe_until_known, name="store-probe", daemon=True).start()

    def stop(self) -> None:
        """Probe no more."""
        self._stopped.set()

    def check(self) -> dict[str, Any]:
        """The named checks and their results.

        Raises:
            HttpProblem: 503 ``degraded``, with the checks.
        """
        checks = self._probe_checks() | {"store_answers": self._store_answers()}
        if all(result == "ok" for result in checks.values()):
            return checks
        failed = "; ".join(f"{name}: {result}" for name, result in checks.items() if result != "ok")
        raise HttpProblem(
            f"not ready: {failed}",
            status=503,
            code="degraded",
            headers={"Retry-After": str(RETRY_AFTER_S)},
            extra={"checks": checks},
        )

    def probe(self) -> None:
        """Probe the store now, and keep what is found."""
        try:
            self._report = probe_store(self._store)
            self._fault = None
        except WeightAveragingError as error:
            self._fault = error
        except Exception:  # the outermost loop of a thread: a store that fails in new ways is not ready either
            log.exception("store_probe_failed")
            self._fault = ConfigurationError("the probe of the store failed; the service's log says how")

    def _probe_until_known(self) -> None:
        while not self._stopped.is_set():
            self.probe()
            if self._report is not None:
                return
            if isinstance(self._fault, UnsafeStoreError):
                self._on_unsafe(self._fault.message)
                return
            log.warning("store_probe_waits", error=self._fault.message if self._fault else "", code="storage")
            self._stopped.wait(_PROBE_AGAIN_S)

    def _probe_checks(self) -> dict[str, Any]:
        if self._report is not None:
            return {check.name: "ok" for check in self._report.checks}
        return {"store_probe": self._fault.message if self._fault else "not finished yet"}

    def _store_answers(self) -> str:
        try:
            self._brief.head(f"{layout.QUEUE}readiness")
        except ObjectNotFoundError:
            return "ok"
        except WeightAveragingError as error:
            return error.message
        return "ok"
