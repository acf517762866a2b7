"""What runs on an embedded stack may leave behind, and must not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from services.stack.state import DataFolder
from support.descendants import descendants
from support.ray_state import living_on_ray
from wa_core import layout

if TYPE_CHECKING:
    from support.stack import RunningStack

_OF_A_RUN = ("trainer.driver", "wa_core.publisher.child", "RayTrainWorker", "TrainController")


def check_nothing_is_left(stack: RunningStack) -> None:
    """No actor and no group on the cluster; of no run a process, a temporary folder, a marker or an upload."""
    deadline = time.monotonic() + 120
    while (living := living_on_ray(stack)) != ([], []) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert living == ([], [])
    assert processes_of_runs(stack) == []
    state = DataFolder(stack.data).read_state()
    assert state is not None
    temporary = Path(state.scratch_dir) / "tmp"
    for name in ("wa-runner-*/driver-*", "**/wa-train-*", "**/wa-code-*"):
        assert list(temporary.glob(name)) == []
    store = stack.store()
    assert list(store.list(layout.QUEUE)) == []
    assert "Uploads" not in store._data.list_multipart_uploads(Bucket=store.bucket)


def processes_of_runs(stack: RunningStack) -> list[str]:
    """The command lines of drivers, workers and uploaders below the stack's processes."""
    pids = stack.pids()
    lines = [line for role in ("runner", "ray") for line in descendants(pids[role]).values()]
    return [line for line in lines if any(sign in line for sign in _OF_A_RUN)]
