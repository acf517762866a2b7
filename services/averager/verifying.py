"""`python -m services.averager.verifying RUN NAME [GENERATION]`: one verification as a process.

`wa verify`, which is torch-free, and idle averagers run this. They read JSON lines from its stdout:
``{"done": 3, "all": 10}`` while checkpoints are folded, then ``{"verified": {...}}`` or
``{"error": {"code": ..., "message": ...}}``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from services.averager.scratch import Scratch
from services.averager.verify import verify
from services.runtime.confined import yield_to_others
from services.runtime.process import run_process
from services.runtime.stores import open_store
from wa_core.clock import SystemClock
from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.runtime.settings import Settings

_NICENESS = 10  # trainers on this machine come first


def serve(arguments: Sequence[str], settings: Settings) -> int:
    """Verify what the arguments name."""
    run_id, name, *rest = arguments
    yield_to_others(niceness=_NICENESS)
    torch.set_num_threads(1)
    try:
        with Scratch(settings.scratch_dir, memory_bytes=settings.accumulator_memory_mb << 20) as scratch:
            found = verify(
                open_store(settings),
                run_id,
                name,
                clock=SystemClock(),
                scratch=scratch,
                generation=int(rest[0]) if rest else None,
                on_checkpoint=lambda done, all_: _say({"done": done, "all": all_}),
            )
    except WeightAveragingError as error:
        _say({"error": {"code": error.code, "message": error.message}})
        return 1
    except OSError as error:
        message = (
            f"the scratch space cannot be written: {error.strerror}; name a folder with room by WA_SCRATCH_DIR"
        )
        _say({"error": {"code": "verification_no_room", "message": message}})
        return 1
    _say({"verified": asdict(found)})
    return 0


def _say(line: object) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201  the protocol


if __name__ == "__main__":
    sys.exit(run_process("verify", partial(serve, sys.argv[1:])))
