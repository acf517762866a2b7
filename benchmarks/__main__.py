"""`python -m benchmarks`: every benchmark, one after the other, and then the page."""

from __future__ import annotations

import subprocess
import sys

COMMANDS = (
    ("offline_merge", "--size", "25M"),
    ("offline_merge", "--size", "25M", "--dtype", "bfloat16"),
    ("offline_merge",),
    ("offline_merge", "--dtype", "bfloat16"),
    ("store_fold",),
    ("memory_update",),
    ("ema_peers",),
    ("batchnorm",),
    ("accuracy",),
    ("digits_seeds",),
    ("start_up",),
    ("averager_soak",),
    ("averager_lag",),
    ("averager_memory",),
    ("checkpointing",),
    ("api_load",),
    ("report",),
)


def main() -> None:
    """Run all of them; stop at the first that fails."""
    for name, *options in COMMANDS:
        print(f"== {name} {' '.join(options)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=True)


if __name__ == "__main__":
    main()
