"""The assess process as the averager starts it: a line that it is asked is the folder of a job."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from services.runtime.child import Child

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: What an assess process is.
COMMAND = (sys.executable, "-m", "services.averager.assess")


class AssessChild(Child):
    """A new assess process.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        super().__init__(command, title="assess process")

    def ask_job(self, folder: Path) -> None:
        """Hand it the job in a folder.

        Raises:
            OSError: it is dead.
        """
        self.ask(json.dumps(str(folder)).encode())
