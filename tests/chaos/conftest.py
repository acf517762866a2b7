"""A fault proxy before the session's SeaweedFS; and everything here is in the slow group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.seaweed import Seaweed


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    """A proxy of the test's own, which spoils nothing yet."""
    with FaultProxy(seaweed.endpoint_url) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: they kill, spoil or simulate for minutes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.chaos)
