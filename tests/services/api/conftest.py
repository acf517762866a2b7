"""An API over a store in memory, without a socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from support.api import ApiRun, app_over
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def store() -> MemoryStore:
    """An empty bucket."""
    return MemoryStore()


@pytest.fixture
def run(store: MemoryStore) -> ApiRun:
    """A run with a published average."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=b"weights")
    return run


@pytest.fixture
def api(store: MemoryStore) -> Iterator[TestClient]:
    """The API over `store`, open to everybody."""
    with TestClient(app_over(store)) as client:
        yield client
