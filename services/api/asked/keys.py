"""Idempotency-Keys as they arrive: what may be one, and that one is served once at a time. Knows no runs."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from services.api.problems import HttpProblem

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_KEY_CHARS = 200


def check_key(key: str) -> None:
    """Refuse an Idempotency-Key that says too little, or more than a header should.

    Raises:
        HttpProblem: 422 ``invalid_idempotency_key``.
    """
    if not 1 <= len(key) <= MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        detail = f"the Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable ASCII characters, such as a UUID"
        faults = [("header.Idempotency-Key", detail)]
        raise HttpProblem(detail, status=422, code="invalid_idempotency_key", faults=faults)


class KeysInUse:
    """The Idempotency-Keys whose submissions this process is making at the moment (ADR 18)."""

    def __init__(self) -> None:
        self._keys: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def check(self, owner: str, key: str) -> None:
        """Refuse a key that is in use.

        Raises:
            HttpProblem: 409 ``submission_in_progress``.
        """
        if (owner, key) in self._keys:
            raise HttpProblem(
                "a submission with this Idempotency-Key is being made at the moment",
                status=409,
                code="submission_in_progress",
                headers={"Retry-After": "1"},
            )

    @contextmanager
    def using(self, owner: str, key: str) -> Iterator[None]:
        """Have a key for oneself.

        Raises:
            HttpProblem: 409 ``submission_in_progress``.
        """
        with self._lock:
            self.check(owner, key)
            self._keys.add((owner, key))
        try:
            yield
        finally:
            with self._lock:
                self._keys.discard((owner, key))
