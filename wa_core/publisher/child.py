"""The uploader's process: reads checkpoints from memory that it shares with the trainer, and writes them.

``python -m wa_core.publisher.child FD PID`` speaks over the socket FD with the process PID: an `Assignment` comes
first, then `Upload`s, each answered with None or the error; None ends it. It knows no torch, so it starts in a
second and stays small. The invariant: it ends when the trainer does, however that ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from wa_core.errors import WeightAveragingError
from wa_core.publisher.writer import CheckpointWriter
from wa_core.store.address import open_address

if TYPE_CHECKING:
    from wa_core.publisher.writer import Assignment, Upload

_LOOK_INTERVAL_S = 0.25
_NICENESS = 10


def main() -> None:
    """Serve until the trainer says that it is done, or is gone."""
    os.nice(_NICENESS)  # where all processors are busy, training comes first
    # What is sent to the whole job (Ctrl-C, a scheduler's SIGTERM) is the trainer's to act on: it may still flush.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    with Connection(int(sys.argv[1])) as connection:
        assignment: Assignment = connection.recv()
        writer = CheckpointWriter(
            open_address(assignment.address),
            assignment.run_id,
            attempt=assignment.attempt,
            deadline_s=assignment.deadline_s,
        )
        with suppress(EOFError):  # a trainer that ends without a word has nothing more to write
            while (upload := connection.recv()) is not None:
                connection.send(_written(writer, upload))


def _written(writer: CheckpointWriter, upload: Upload) -> WeightAveragingError | None:
    try:
        writer.write(upload)
    except WeightAveragingError as error:
        return error
    except Exception as error:  # noqa: BLE001  the process's outermost loop; the trainer raises it
        traceback.print_exc()
        return WeightAveragingError(
            f"the uploader failed: {type(error).__name__}: {error}", code="uploader_failed"
        )
    return None


def _end_with(trainer: int) -> None:
    """End the process once the trainer is gone, whatever it is waiting for; an orphan gets another parent.

    Its end of the socket is no sign: processes that the trainer has forked may hold that open.
    """
    while os.getppid() == trainer:
        time.sleep(_LOOK_INTERVAL_S)
    os._exit(1)


if __name__ == "__main__":
    main()
