"""The error tree, grouped by what a handler does about an error.

::

    WeightAveragingError
    ├── TransientError                 try again, with backoff
    │   └── StoreUnavailableError      the object store is away, slow or overloaded
    ├── NotFoundError                  nothing there
    │   ├── ObjectNotFoundError
    │   ├── RunNotFoundError
    │   └── AverageNotFoundError
    ├── ConflictError                  somebody else was first: read again, then decide
    │   ├── AlreadyExistsError         a create-once key is taken
    │   ├── FencedError                a newer attempt or worker has taken over: stop
    │   ├── AlreadyFinishedError       the run has ended
    │   └── NoAverageYetError          nothing has been folded or published yet
    ├── CorruptError                   bytes are not what was recorded: never fold them
    ├── IncompatibleError              sound, but does not fit what is being averaged
    ├── InvalidInputError              the caller must change the call (also a ValueError)
    │   └── EmptyCalibrationError      calibration data yielded nothing
    ├── UserCodeError                  a recipe raised or died
    └── ConfigurationError             an operator must change the set-up
        ├── StoreAuthError             the store refuses the credentials
        └── UnsafeStoreError           the store does not honour create-once

Every class has a stable ``kind``; an instance may carry a finer ``code`` (for example why a checkpoint
was rejected). A message says what happened, with the values, then what to do.
"""

from __future__ import annotations

from typing import ClassVar


class WeightAveragingError(Exception):
    """Base of every error this project raises on purpose."""

    kind: ClassVar[str] = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.kind


class TransientError(WeightAveragingError):
    """Trying again later may work."""

    kind = "transient"


class StoreUnavailableError(TransientError):
    """The object store did not answer, or said that it is overloaded."""

    kind = "store_unavailable"


class NotFoundError(WeightAveragingError):
    """What was asked for does not exist."""

    kind = "not_found"


class ObjectNotFoundError(NotFoundError):
    """No object has this key."""

    kind = "object_not_found"


class RunNotFoundError(NotFoundError):
    """No run has this id."""

    kind = "run_not_found"


class AverageNotFoundError(NotFoundError):
    """The run has no average, or no generation, of this name."""

    kind = "average_not_found"


class ConflictError(WeightAveragingError):
    """Somebody else was first; read again and decide anew."""

    kind = "conflict"


class AlreadyExistsError(ConflictError):
    """A create-once key is taken."""

    kind = "already_exists"


class FencedError(ConflictError):
    """A newer attempt or another worker has taken over; the holder must stop."""

    kind = "fenced"


class AlreadyFinishedError(ConflictError):
    """The run has ended, so nothing about it can change."""

    kind = "already_finished"


class NoAverageYetError(ConflictError):
    """The average exists, but has no published weights yet."""

    kind = "no_average_yet"


class CorruptError(WeightAveragingError):
    """Bytes are not what was recorded or promised; they must never be folded."""

    kind = "corrupt"


class IncompatibleError(WeightAveragingError):
    """Well-formed, but does not fit the tensors being averaged."""

    kind = "incompatible"


class InvalidInputError(WeightAveragingError, ValueError):
    """The caller passed something impossible; the message says what is allowed."""

    kind = "invalid_input"


class EmptyCalibrationError(InvalidInputError):
    """Calibration data yielded no batch, so BatchNorm statistics cannot be computed."""

    kind = "calibration_failed"


class UserCodeError(WeightAveragingError):
    """A recipe raised, or the process that ran it died."""

    kind = "user_code"


class ConfigurationError(WeightAveragingError):
    """The set-up is wrong; an operator must change it."""

    kind = "configuration"


class StoreAuthError(ConfigurationError):
    """The object store refuses the credentials."""

    kind = "storage_auth"


class UnsafeStoreError(ConfigurationError):
    """The object store does not honour the conditions that commits rely on."""

    kind = "unsafe_store"
