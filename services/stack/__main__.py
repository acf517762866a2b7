"""The background supervisor: ``python -m services.stack --data DIR``. Started by `wa up --detach`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.telemetry import configure_logging
from services.stack.embedded import StackOptions, StopSignals, run_stack
from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from services.stack.state import Connection


def main() -> int:
    """Run the stack until a signal; say over stdout, in one line, whether it got ready."""
    parser = argparse.ArgumentParser(prog="python -m services.stack", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--port", type=int, help="port of the API (default: a free one)")
    parser.add_argument("--parent", type=int, help="end when this process, our parent, has died")
    chosen = parser.parse_args()
    configure_logging("stack", log_format=os.environ.get("WA_LOG_FORMAT", "console"))
    try:
        run_stack(
            StackOptions(data=chosen.data, api_port=chosen.port),
            stop=StopSignals().install(),
            environment=os.environ,
            on_ready=_say_ready,
            is_abandoned=lambda: chosen.parent is not None and os.getppid() != chosen.parent,
        )
    except WeightAveragingError as error:
        _say({"error": error.message, "kind": error.kind})
        return 1
    return 0


def _say_ready(_: Connection) -> None:
    _say({"ready": True})


def _say(answer: dict[str, str | bool]) -> None:
    """Answer once, and let go of the pipe; whoever waited for the answer may be gone."""
    try:
        os.write(sys.stdout.fileno(), json.dumps(answer).encode() + b"\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        return


if __name__ == "__main__":
    sys.exit(main())
