"""The mean of checkpoints that are local files: `wa average` beside the usual script and mergekit.

`python -m benchmarks.offline_merge` writes Llama-shaped checkpoints to a temporary folder and merges them in whole
processes, in turn: `wa average --rule swa`, load everything and add (safetensors `load_file`, `add_`), and
mergekit's linear merge. Files are in the page cache for all of them where memory allows. Writes
`benchmarks/results/offline_merge-SIZE-DTYPE.{json,md}`: wall time and peak memory, and each result's error.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import checkpoints, processes, results
from benchmarks.peers import SCRIPTS, folder_of, python_of

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "wa average"
LOADING = "load_file, add_"
MERGEKIT = "mergekit linear"


def main() -> None:
    """Measure one size and dtype."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=checkpoints.SIZES, default="350M")
    parser.add_argument("--dtype", choices=checkpoints.DTYPES, default="float32")
    parser.add_argument("--count", type=int, default=8, help="checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
        data = measure(Path(folder), options.size, options.dtype, count=options.count, rounds=options.rounds)
    results.write(f"offline_merge-{options.size}-{options.dtype}", data=data, text=markdown(data))


def measure(folder: Path, size: str, dtype: str, *, count: int, rounds: int) -> dict[str, Any]:
    """Wall time, memory and error of each kind."""
    sources = [write_in_child(folder / f"step_{step}", size, dtype, seed=step) for step in range(count)]
    commands = {kind: make(folder, sources, dtype) for kind, make in COMMANDS.items()}
    found = processes.alternate(
        {kind: _cleared(argv, output) for kind, (argv, output) in commands.items()}, rounds=rounds
    )
    summary = processes.summary(found)
    for kind, (_, output) in commands.items():
        checked = processes.run(
            [python_of("torch"), str(SCRIPTS / "mean_error.py"), *map(str, sources), str(output)]
        )
        summary[kind]["error"] = json.loads(checked.output)
    return {
        "num_parameters": checkpoints.num_parameters(size),
        "dtype": dtype,
        "count": count,
        "rounds": rounds,
        "kinds": summary,
    }


def write_in_child(folder: Path, size: str, dtype: str, *, seed: int) -> Path:
    """A checkpoint, written by another process: this one must stay small."""
    code = (
        "from pathlib import Path; from benchmarks.checkpoints import write_model;"
        f"write_model(Path({str(folder)!r}), size={size!r}, dtype={dtype!r}, seed={seed})"
    )
    processes.run([sys.executable, "-c", code])
    return folder / "model.safetensors"


def _cleared(argv: list[str], output: Path) -> Callable[[], processes.Usage]:
    def go() -> processes.Usage:
        shutil.rmtree(output.parent, ignore_errors=True)
        output.parent.mkdir()
        return processes.run(argv, env={"HF_HUB_OFFLINE": "1"})

    return go


def _ours(folder: Path, sources: list[Path], _: str) -> tuple[list[str], Path]:
    output = folder / "ours" / "model.safetensors"
    steps = ",".join(map(str, range(1, len(sources) + 1)))
    argv = [sys.executable, "-m", "services.cli", "average", *map(str, sources), "--rule", "swa", "--steps", steps]
    return [*argv, "-o", str(output)], output


def _load_and_add(folder: Path, sources: list[Path], _: str) -> tuple[list[str], Path]:
    output = folder / "loading" / "model.safetensors"
    return [python_of("torch"), str(SCRIPTS / "load_and_add.py"), *map(str, sources), str(output)], output


def _mergekit(folder: Path, sources: list[Path], dtype: str) -> tuple[list[str], Path]:
    output = folder / "mergekit" / "model.safetensors"
    models = [{"model": str(source.parent), "parameters": {"weight": 1.0}} for source in sources]
    # JSON is YAML.
    config = folder / "mergekit.yaml"
    config.write_text(json.dumps({"merge_method": "linear", "dtype": dtype, "models": models}))
    program = str(folder_of("mergekit") / "mergekit-yaml")
    return [program, str(config), str(output.parent), "--no-copy-tokenizer", "--quiet"], output


COMMANDS = {OURS: _ours, LOADING: _load_and_add, MERGEKIT: _mergekit}


def markdown(data: dict[str, Any]) -> str:
    """The table that people read."""
    ours = data["kinds"][OURS]["median_s"]
    rows = [
        [
            kind,
            f"{found['median_s']:.2f} s",
            f"{found['median_s'] / ours:.2f}",
            f"{median(found['cpu_s']):.2f} s",
            f"{found['peak_rss_bytes'] / 1e6:.0f} MB",
            f"{found['error']['max']:.1e}",
            f"{found['error']['rms']:.1e}",
        ]
        for kind, found in data["kinds"].items()
    ]
    gigabytes = data["num_parameters"] * checkpoints.DTYPES[data["dtype"]][1] / 1e9
    title = (
        f"Mean of {data['count']} checkpoints of {data['num_parameters'] / 1e6:.0f}M {data['dtype']} parameters "
        f"({gigabytes:.2f} GB each), local files, whole processes, medians of {data['rounds']}; none "
        f"waits for the disk. Errors against float64, in units of the mean's root mean square."
    )
    header = ["", "wall time", "times ours", "CPU time", "peak RSS", "largest error", "rms error"]
    return f"{title}\n\n{results.table(header, rows)}"


if __name__ == "__main__":
    main()
