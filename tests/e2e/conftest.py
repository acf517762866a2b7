"""One embedded stack for the whole module, on free ports, gone at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.stack import RunningStack, down, up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """SeaweedFS, Ray, runner, averager and API, all real."""
    data: Path = tmp_path_factory.mktemp("stack")
    try:
        yield up(data)
    finally:
        down(data)
