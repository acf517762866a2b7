"""The page over a bucket in memory, on an API that really serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.api import serving
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here drives the browser."""
    for item in items:
        if "tests/browser/" in str(item.path):
            item.add_marker(pytest.mark.browser)


@pytest.fixture
def store() -> MemoryStore:
    """An empty bucket."""
    return MemoryStore()


@pytest.fixture
def site(store: MemoryStore) -> Iterator[str]:
    """The service's address, open to everybody."""
    with serving(store) as url:
        yield url
