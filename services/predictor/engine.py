"""One holder process and those who wait for it: requests for one model are put to it together, oldest first.

It knows a child process, a queue and limits; no HTTP and no bucket. The invariants: never more than `max_waiting`
requests wait; every request that was taken gets exactly one answer, whatever becomes of the child. A child that
dies, takes too long or too much memory, or talks nonsense is ended, and a new one serves the next request.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import ValidationError

from services.predictor.protocol import AskModel, DropModel, LoadModel, Outcome, Reply
from services.runtime.child import Child
from services.runtime.prediction import PredictionRefusedError
from wa_core.errors import UserCodeError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from services.predictor.protocol import Command
    from services.predictor.published import Target

log = structlog.get_logger(__name__)

MAX_BATCH_INSTANCES = 256
BATCH_WAIT_S = 0.003
_LOOK_S = 0.1
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one holder process may take.

    Attributes:
        models_bytes: files of models that are loaded at a time; those used longest ago make room.
        memory_bytes: the memory beyond which it is killed.
        time_s: how long one batch, or loading one model, may take.
        idle_s: without requests for so long, the process is ended, and its memory given back.
        max_waiting: requests that may wait.
    """

    models_bytes: int = 1 << 30
    memory_bytes: int = 4 << 30
    time_s: float = 30.0
    idle_s: float = 600.0
    max_waiting: int = 64


@dataclass(frozen=True, slots=True)
class _Waiting:
    target: Target
    instances: list[Any]
    answer: Future[Outcome] = field(default_factory=Future)


class Engine:
    """A holder process, started when it is first needed, and the thread that feeds it.

    Args:
        command: what the holder is.
        path_of: where the weights of a target are, on disk.
        code: the folder of the package that its recipes are imported from; None for built-in ones.
        limits: what the holder may take.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        path_of: Callable[[Target], Path],
        code: Path | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._command = command
        self._path_of = path_of
        self._code = code
        self._limits = limits or Limits()
        self._child: Child | None = None
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._waiting: list[_Waiting] = []
        self._is_closing = self._is_serving = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="predictor-engine", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether anybody waits for an answer."""
        with self._changed:
            return bool(self._waiting) or self._is_serving

    @property
    def pid(self) -> int | None:
        """The holder's process id, while there is one."""
        child = self._child
        return child.pid if child else None

    def check(self, target: Target) -> None:
        """Refuse a model that is larger than all that may be loaded.

        Raises:
            PredictionRefusedError: it is (`model_too_large`).
        """
        if target.file.size_bytes > self._limits.models_bytes:
            raise PredictionRefusedError(
                f"the weights are {target.file.size_bytes} bytes, and this predictor loads at most "
                f"{self._limits.models_bytes}; raise WA_PREDICTOR_MODELS_MB",
                code="model_too_large",
            )

    def submit(self, target: Target, instances: list[Any]) -> Future[Outcome]:
        """Let a request wait for its turn; returns at once.

        Raises:
            PredictionRefusedError: too many wait already (`predictor_busy`).
        """
        with self._changed:
            if len(self._waiting) >= self._limits.max_waiting or self._is_closing:
                raise PredictionRefusedError(
                    f"{len(self._waiting)} requests wait for this model already; try again", code="predictor_busy"
                )
            waiting = _Waiting(target, instances)
            self._waiting.append(waiting)
            self._changed.notify_all()
        return waiting.answer

    def close(self) -> None:
        """Answer those who wait with a refusal, and end the process."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        # The process that starts the child must be this thread: when its parent thread ends, the child does.
        try:
            while batch := self._next_batch():
                self._serve(batch)
                self._is_serving = False
        finally:
            self._end_child()
            closed = PredictionRefusedError("the predictor is stopping; try again", code="predictor_unavailable")
            for waiting in self._waiting:
                if waiting.answer.set_running_or_notify_cancel():
                    waiting.answer.set_exception(closed)

    def _next_batch(self) -> list[_Waiting]:
        """Those who wait longest for one model, as many as go together; none when closing."""
        while True:
            with self._changed:
                while not self._changed.wait_for(self._has_news, self._limits.idle_s):
                    self._end_child()
                self._changed.wait_for(self._is_full, BATCH_WAIT_S)
                if self._is_closing:
                    return []
                batch = self._take()
                self._is_serving = bool(batch)
            if batch:
                return batch

    def _take(self) -> list[_Waiting]:
        key, left = self._waiting[0].target.key, MAX_BATCH_INSTANCES
        taken: list[_Waiting] = []
        others: list[_Waiting] = []
        for waiting in self._waiting:
            if waiting.target.key == key and (not taken or len(waiting.instances) <= left):
                taken.append(waiting)
                left -= len(waiting.instances)
            else:
                others.append(waiting)
        self._waiting = others
        return [waiting for waiting in taken if waiting.answer.set_running_or_notify_cancel()]

    def _has_news(self) -> bool:
        return bool(self._waiting) or self._is_closing

    def _is_full(self) -> bool:
        return self._is_closing or sum(len(one.instances) for one in self._waiting) >= MAX_BATCH_INSTANCES

    def _serve(self, batch: list[_Waiting]) -> None:
        target = batch[0].target
        try:
            self._load(target)
            asked = AskModel(key=target.key, requests=[waiting.instances for waiting in batch])
            outcomes = self._exchange(asked).outcomes
            if len(outcomes) != len(batch):
                raise self._given_up("prediction_failed", "the process that holds the model gave no answer")  # noqa: TRY301
        except WeightAveragingError as error:
            for waiting in batch:
                waiting.answer.set_exception(error)
        except Exception as error:  # the thread's outermost loop: without an answer, callers would wait for ever
            log.exception("prediction_failed")
            self._end_child()
            for waiting in batch:
                waiting.answer.set_exception(error)
        else:
            for waiting, outcome in zip(batch, outcomes, strict=True):
                waiting.answer.set_result(outcome)

    def _load(self, target: Target) -> None:
        if self._child is not None and not self._child.is_ready:
            self._end_child()
        if target.key in self._loaded:
            self._loaded.move_to_end(target.key)
            return
        while self._loaded and sum(self._loaded.values()) + target.file.size_bytes > self._limits.models_bytes:
            oldest, _ = self._loaded.popitem(last=False)
            self._exchange(DropModel(key=oldest))
        request = target.request
        wanted = LoadModel(
            key=target.key,
            recipe=request.recipe,
            code=str(self._code) if self._code else None,
            config=request.config,
            seed=request.seed,
            path=str(self._path_of(target)),
        )
        self._exchange(wanted)
        self._loaded[target.key] = target.file.size_bytes
        log.info("model_loaded", run_id=target.run_id, average=target.average, generation=target.generation)

    def _exchange(self, command: Command) -> Reply:
        try:
            if self._child is None:
                self._child = Child(self._command, title="process that holds the model")
            self._child.ask(command.model_dump_json().encode())
            reply = Reply.model_validate_json(self._next_line(self._child))
        except (UserCodeError, OSError, ValidationError) as error:
            message = error.message if isinstance(error, UserCodeError) else f"{type(error).__name__}"
            raise self._given_up("prediction_failed", f"the recipe did not answer: {message}") from None
        if reply.refusal is not None:
            raise PredictionRefusedError(reply.refusal.message, code=reply.refusal.code)
        return reply

    def _next_line(self, child: Child) -> bytes:
        deadline = time.monotonic() + self._limits.time_s
        while True:
            if lines := child.lines():
                return lines[0]
            if (held := child.memory_bytes or 0) > self._limits.memory_bytes:
                raise self._given_up(
                    "model_too_large",
                    f"the model took {held // _MIB} MiB of memory, over the limit of "
                    f"{self._limits.memory_bytes // _MIB} MiB; raise WA_PREDICTOR_MEMORY_MB",
                )
            if time.monotonic() > deadline:
                raise self._given_up(
                    "prediction_timeout",
                    f"no answer within {self._limits.time_s:g} s; ask for less at once, or raise "
                    f"WA_PREDICTOR_TIME_LIMIT_S",
                )
            child.wait(_LOOK_S)

    def _given_up(self, code: str, message: str) -> PredictionRefusedError:
        log.warning("holder_ended", code=code, reason=message)
        self._end_child()
        return PredictionRefusedError(message, code=code)

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
        self._child = None
        self._loaded.clear()
