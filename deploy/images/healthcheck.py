#!/usr/bin/env python3
"""The healthcheck of every container: each target must answer. Standard library only, since it runs often.

Usage: healthcheck TARGET...
    http://host:port/path   answers with a status below 400
    tcp://host:port         accepts a connection
    process:TEXT            some process of this container has TEXT in its command line
"""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_S = 3.0


def check(target: str) -> None:
    """Return if `target` answers.

    Raises:
        OSError: it does not, or not in time.
        ValueError: the target is of no known form.
    """
    if target.startswith("process:"):
        _find_process(target.removeprefix("process:"))
        return
    parts = urlsplit(target)
    if parts.scheme == "http":
        with urllib.request.urlopen(target, timeout=TIMEOUT_S):  # noqa: S310  the scheme is http
            return
    if parts.scheme == "tcp" and parts.hostname and parts.port:
        with socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S):
            return
    raise ValueError("write http://host:port/path, tcp://host:port or process:TEXT")


def _find_process(text: str) -> None:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command_line = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it ended while we looked
        if text in command_line.replace(b"\0", b" ").decode(errors="replace"):
            return
    raise ProcessLookupError("no such process in this container")


def main(targets: list[str]) -> int:
    """Check all targets; the first that fails is named, which `docker inspect` shows."""
    for target in targets:
        try:
            check(target)
        except (OSError, ValueError) as error:
            sys.stderr.write(f"{target}: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
