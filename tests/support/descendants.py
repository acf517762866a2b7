"""What /proc knows of the processes that a test has started: who is below one, and whether one still lives."""

from __future__ import annotations

from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line of everything that `pid` has started, directly or not."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name may hold spaces and parentheses: the fields proper follow the last one.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(folder.name)] = int(fields[1])
    found = {child for child in parents if _is_below(child, pid, parents)}
    return {child: _command_line(child) for child in found}


def is_alive(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _is_below(child: int, pid: int, parents: dict[int, int]) -> bool:
    while (child := parents.get(child, 0)) > 1:
        if child == pid:
            return True
    return False


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
