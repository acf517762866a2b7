"""A fault proxy before the session's SeaweedFS."""

from __future__ import annotations

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
