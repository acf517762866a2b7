"""The assess process as the averager starts it: a line that it is asked is the folder of a job."""

from __future__ import annotations

import json
import os
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING

from services.runtime.child import Child

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: What an assess process is.
COMMAND = (sys.executable, "-m", "services.averager.assess")


class AssessChild(Child):
    """A new assess process.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str] = COMMAND, *, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(command, title="assess process", environment=environment)

    def ask_job(self, folder: Path) -> None:
        """Hand it the job in a folder.

        Raises:
            OSError: it is dead.
        """
        self.ask(json.dumps(str(folder)).encode())


def ray_environment() -> dict[str, str]:
    """What a process needs to join the cluster."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
