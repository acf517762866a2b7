"""What lives on a Ray cluster, asked by a process of its own, so that a test joins none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.stack import RunningStack

_CODE = """
import json, sys
import ray
from ray._private.state import actors
from ray.util import placement_group_table

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
living = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
print(json.dumps([living, groups]))
"""
_OF_THE_CLUSTER = "_AutoscalingCoordinatorActor"


def living_on_ray(stack: RunningStack) -> tuple[list[str], list[str]]:
    """The classes of living actors, and the states of placement groups that are not removed.

    Left out is the one actor that Ray Train starts on a cluster for all runs that will ever be on it.
    """
    runner = stack.pids()["runner"]
    with open(f"/proc/{runner}/environ", "rb") as file:  # noqa: PTH123  no file of a folder
        pairs = (entry.partition(b"=") for entry in file.read().split(b"\0") if entry)
        environment = {name.decode(): value.decode() for name, _, value in pairs}
    told = {name: value for name, value in environment.items() if name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, environment["WA_RAY_ADDRESS"]],
        env={**os.environ, **told},
        stdout=subprocess.PIPE,
        check=True,
        timeout=90,
    )
    actors, groups = json.loads(done.stdout.splitlines()[-1])
    return [name for name in actors if name != _OF_THE_CLUSTER], groups
