"""What can go wrong between a caller and the service.

Two errors: the service did not answer (`ServiceUnreachableError`), or it answered with a problem (`ApiError`).
Both belong to the project's error tree, so one handler shows either of them.
"""

from __future__ import annotations

from wa_core.errors import TransientError, WeightAveragingError


class ServiceUnreachableError(TransientError):
    """No connection to the service, or it was cut before an answer came."""

    kind = "service_unreachable"


class ApiError(WeightAveragingError):
    """The service answered with a problem (RFC 9457).

    Attributes:
        status: the HTTP status.
        code: the stable code, such as ``run_not_found``.
        detail: what happened, for people.
        hint: what to do about it, or None.
        errors: the faults of a refused body, each with `pointer` and `message`.
        retry_after_s: seconds after which trying again makes sense, or None.
        path: what was asked for, such as ``/v1/runs/01JZ…``.
    """

    kind = "api"

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        code: str,
        hint: str | None = None,
        errors: list[dict[str, str]] | None = None,
        retry_after_s: float | None = None,
        path: str = "",
    ) -> None:
        super().__init__(detail, code=code)
        self.status = status
        self.detail = detail
        self.hint = hint
        self.errors = errors or []
        self.retry_after_s = retry_after_s
        self.path = path
