"""The life of a long-running process: stop on SIGTERM or SIGINT, tick until then, survive a bad tick."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import structlog

from wa_core.errors import StoreAuthError, TransientError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

log = structlog.get_logger(__name__)

_PARENT_POLL_S = 0.5


class Stop:
    """Says when to stop. `install` ties it to SIGTERM and SIGINT; a second signal kills as usual.

    A signal may come while the main thread is inside of `wait`. A `threading.Event` would ask there for a lock
    that the same thread holds already, and never get it; a `SimpleQueue` may be put into at any moment.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._waking: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Ask for the end."""
        self.is_set = True
        self._waking.put(None)

    def wait(self, seconds: float) -> bool:
        """Sleep, but wake at once when asked to stop; returns whether that is so."""
        with suppress(Empty):
            self._waking.get(timeout=seconds)
            self._waking.put(None)  # for whoever waits besides
        return self.is_set

    def install(self) -> Stop:
        """Let SIGTERM and SIGINT set it, once each."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.set()


def run_ticks(tick: Callable[[], bool], *, stop: Stop, interval_s: float) -> None:
    """Call `tick` until stopped; wait `interval_s` after each one that found nothing to do.

    A tick that fails is logged and tried again with growing waits (up to 5 s): the state is in the bucket, so
    nothing is lost by starting over.
    """
    wait_s = interval_s
    while not stop.is_set:
        try:
            is_busy = tick()
        except TransientError as error:
            if not stop.is_set:
                log.warning("store_away", error=error.message, retry_in_s=wait_s)
        except StoreAuthError as error:
            # Credentials can be mended while we run; until then this is the one line that an operator needs.
            log.error("storage_auth", error=error.message, retry_in_s=wait_s)  # noqa: TRY400  the message says it all
        except Exception:  # the outermost loop: one broken run must not take the others down
            log.exception("tick_failed", retry_in_s=wait_s)
        else:
            wait_s = interval_s
            if not is_busy:
                stop.wait(interval_s)
            continue
        stop.wait(wait_s)
        wait_s = min(wait_s * 2, 5.0)


def stop_with_parent(stop: Stop, *, parent_pid: int) -> None:
    """Set `stop` when the parent process dies, so that no orphan works on after a SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            if stop.wait(_PARENT_POLL_S):
                return
        stop.set()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
