"""Does averaging win? Runs the digits recipe with five seeds on an embedded stack, and compares held-out metrics.

`python -m benchmarks.digits_seeds` starts a stack in a temporary folder, submits one run per seed, and writes
`benchmarks/results/digits_seeds.{json,md}`: for every seed the last raw iterate beside SWA and EMA, before and
after BatchNorm recalibration. The evaluation is the service's own; nothing is computed here but means.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from services.client import Client

SEEDS = range(5)
RESULTS = Path(__file__).parent / "results"
AVERAGES = {"swa": "swa:start_step=100", "ema": "ema:half_life=60"}
WA = [sys.executable, "-m", "services.cli"]


def main() -> None:
    """Run all seeds, then write and print the table."""
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
        data = str(Path(folder) / "data")
        up = subprocess.run([*WA, "up", "--detach", "--json", "--data", data], check=True, stdout=subprocess.PIPE)
        stack = json.loads(up.stdout)
        try:
            with Client(stack["api_url"], token=stack["token"]) as client:
                rows = [measure(client, seed) for seed in SEEDS]
        finally:
            subprocess.run([*WA, "down", "--data", data], check=True)
    table = markdown(rows)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "digits_seeds.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "digits_seeds.md").write_text(table)
    print(table)


def measure(client: Client, seed: int) -> dict[str, Any]:
    """Train one seed to its end; its held-out metrics by name of the weights."""
    request = {
        "recipe": "services.recipes.digits:Digits",
        "config": {"epochs": 12},
        "checkpoint": {"every_steps": 20},
        "averages": [{"name": name, "rule": rule} for name, rule in AVERAGES.items()],
        "seed": seed,
    }
    run = client.wait(client.submit(request)["run_id"])
    assert run["state"] == "succeeded", run
    row: dict[str, Any] = {"seed": seed}
    for average in client.averages(run["run_id"]):
        evaluation = average["evaluation"]
        row["raw"] = evaluation["raw"]
        row[f"{average['name']}, before"] = evaluation["before_recalibration"]
        row[average["name"]] = evaluation["averaged"]
    print(f"seed {seed}: " + ", ".join(f"{name} {row[name]['loss']:.4f}" for name in row if name != "seed"))
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table over seeds: means, and for the loss, which one bad seed can dominate, medians and deviations."""
    lines = ["| weights | held-out loss | median | std over seeds | held-out accuracy |", "|---|---|---|---|---|"]
    for name in [name for name in rows[0] if name != "seed"]:
        losses = [row[name]["loss"] for row in rows]
        accuracy = mean(row[name]["accuracy"] for row in rows)
        spread = f"{median(losses):.4f} | {stdev(losses):.4f}"
        lines.append(f"| {name} | {mean(losses):.4f} | {spread} | {100 * accuracy:.2f} % |")
    wins = sum(min(row["swa"]["loss"], row["ema"]["loss"]) < row["raw"]["loss"] for row in rows)
    lines.append("")
    lines.append(f"SWA or EMA beats the last raw iterate's loss in {wins} of {len(rows)} seeds.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
