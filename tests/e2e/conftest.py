"""The undisturbed main job, which several tests look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.stack import submission

if TYPE_CHECKING:
    from support.stack import RunningStack


@pytest.fixture(scope="session")
def main_run(stack: RunningStack) -> dict[str, Any]:
    """One run of the digits recipe, finished."""
    with stack.client() as client:
        return client.wait(client.submit(submission())["run_id"])
