"""Where figures go: `benchmarks/results/NAME.json` for machines and `NAME.md` for people."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The processor's name and the number of cores."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def write(name: str, *, data: Mapping[str, Any], text: str) -> None:
    """Write both files and print the text."""
    RESULTS.mkdir(exist_ok=True)
    # A load far above the benchmark's own says that something else was running.
    about = {"machine": machine(), "load_average_15_min": os.getloadavg()[2]}
    (RESULTS / f"{name}.json").write_text(json.dumps(about | dict(data), indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
