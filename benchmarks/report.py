"""`docs/benchmarks.md`, put together from `benchmarks/results/*.md`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import RESULTS

OUT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
CHAPTERS = {
    "offline_merge": ("Averaging local files", "python -m benchmarks.offline_merge"),
    "store_fold": ("Folding a checkpoint from S3", "python -m benchmarks.store_fold"),
    "memory_update": ("Updating an average in memory", "python -m benchmarks.memory_update"),
    "ema_peers": ("Exponential averages in memory, beside every peer", "python -m benchmarks.ema_peers"),
    "batchnorm": ("BatchNorm recalibration", "python -m benchmarks.batchnorm"),
    "accuracy": ("Accuracy", "python -m benchmarks.accuracy"),
    "digits_seeds": ("Does averaging win?", "python -m benchmarks.digits_seeds"),
}
INTRODUCTION = """# Benchmarks

Written by `make bench`; do not edit. Every peer runs in a virtual environment of its own with pinned versions
(`benchmarks/peers.py`), on the same inputs, in turn with ours. Single measurements are in
`benchmarks/results/*.json`, with the machine they were taken on.
"""


def main() -> None:
    """Write the page from whatever results there are."""
    parts = [INTRODUCTION]
    for prefix, (title, command) in CHAPTERS.items():
        found = sorted(RESULTS.glob(f"{prefix}*.md"))
        if found:
            parts.append(f"## {title}\n\n`{command}`\n")
            parts += [_without_title(path.read_text()).strip() + "\n" for path in found]
    notes = Path(__file__).parent / "notes.md"
    if notes.exists():
        parts.append(notes.read_text())
    OUT.write_text("\n".join(parts))
    print(OUT)


def _without_title(text: str) -> str:
    first, _, rest = text.partition("\n")
    return rest if first.startswith("# ") else text


if __name__ == "__main__":
    main()
