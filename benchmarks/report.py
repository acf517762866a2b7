"""`docs/benchmarks.md`, put together from `benchmarks/results/*.md`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.checkpointing import COPIES_ALLOWED, OURS, TIMES_BLOCKING, added_s
from benchmarks.results import RESULTS

if TYPE_CHECKING:
    from collections.abc import Iterator

OUT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
CHAPTERS = {
    "offline_merge": ("Averaging local files", "python -m benchmarks.offline_merge"),
    "store_fold": ("Folding a checkpoint from S3", "python -m benchmarks.store_fold"),
    "memory_update": ("Updating an average in memory", "python -m benchmarks.memory_update"),
    "ema_peers": ("Exponential averages in memory, beside every peer", "python -m benchmarks.ema_peers"),
    "batchnorm": ("BatchNorm recalibration", "python -m benchmarks.batchnorm"),
    "accuracy": ("Accuracy", "python -m benchmarks.accuracy"),
    "digits_seeds": ("Does averaging win?", "python -m benchmarks.digits_seeds"),
    "start_up": ("From a submission to the first step", "python -m benchmarks.start_up"),
    "averager_soak": ("The averager under faults", "python -m benchmarks.averager_soak"),
    "averager_lag": ("From a commit to a published average", "python -m benchmarks.averager_lag"),
    "averager_memory": ("The averager's memory", "python -m benchmarks.averager_memory"),
    "checkpointing": ("What checkpoints add to training", "python -m benchmarks.checkpointing"),
    "api_load": ("The API under load", "python -m benchmarks.api_load"),
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
    parts.insert(1, targets())
    OUT.write_text("\n".join(parts))
    print(OUT)


def targets() -> str:
    """What was promised beside what these results say."""
    rows = [
        [what, promise, f"{found:.3g}", "yes" if is_met else "**no**"]
        for what, promise, found, is_met in (
            *_offline(),
            *_fold(),
            *_memory(),
            *_ema_peers(),
            *_batchnorm(),
            *_accuracy(),
            *_start_up(),
            *_averager(),
            *_checkpointing(),
            *_api(),
        )
    ]
    loads = [f"{data['load_average_15_min']:.1f}" for path in RESULTS.glob("*.json") if (data := _about(path))]
    note = (
        f"Load averages (15 minutes) when results were written: {', '.join(loads) or 'not recorded'}. "
        f"Above the number of CPUs, something else was running, and even ratios are rough."
    )
    return f"## Promises\n\n{results.table(['', 'promise', 'measured', 'kept'], rows)}\n{note}\n"


def _about(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    return data if isinstance(data, dict) and "load_average_15_min" in data else {}


def _load(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _offline() -> Iterator[tuple[str, str, float, bool]]:
    if not (data := _load("offline_merge-350M-float32")):
        return
    kinds = data["kinds"]
    ours = kinds["wa average"]
    for kind, wanted in (("load_file, add_", 2.5), ("mergekit linear", 8.0)):
        ratio = kinds[kind]["median_s"] / ours["median_s"]
        yield (
            f"mean of {data['count']} files of 350M parameters: times as fast as {kind}",
            f">= {wanted}",
            ratio,
            ratio >= wanted,
        )
    for path in sorted(RESULTS.glob("offline_merge-*.json")):
        data = json.loads(path.read_text())
        peak = data["kinds"]["wa average"]["peak_rss_bytes"] / 1e6
        what = f"mean of {data['count']} files of {data['num_parameters'] / 1e6:.0f}M {data['dtype']} parameters"
        yield f"{what}: peak memory, MB", "< 500", peak, peak < 500


def _fold() -> Iterator[tuple[str, str, float, bool]]:
    if not (data := _load("store_fold-350M")):
        return
    seconds = {kind: median(values) for kind, values in data["seconds"].items()}
    slow = {kind: median(values) for kind, values in data["slow_link_seconds"].items()}
    fastest = min(value for kind, value in seconds.items() if kind.startswith("curl") or kind == "boto3 to a file")
    for count, limit in ((1, 1.1), (4, 1.3)):
        kind = f"fold into {count} average{'s' if count > 1 else ''}"
        ratio = seconds[kind] / fastest
        yield f"{kind}: times the fastest plain download", f"<= {limit}", ratio, ratio <= limit
        ratio = slow[kind] / slow["curl to nowhere"]
        yield f"{kind}, slow link: times the download", "<= 1.05", ratio, ratio <= 1.05
    ratio = seconds["boto3 to a file, load_file, lerp"] / seconds["fold into 1 average"]
    yield "fold into 1 average: times as fast as download, load_file, lerp", ">= 4", ratio, ratio >= 4
    ratio = data["bytes_on_the_wire_of_two_folds"] / 2 / data["size_bytes"]
    yield "reads of each byte", "1", ratio, ratio < 1.01


def _memory() -> Iterator[tuple[str, str, float, bool]]:
    for mode, seconds in _load("memory_update").get("seconds", {}).items():
        medians = {kind: median(values) for kind, values in seconds.items()}
        for kind, peer in (
            ("WeightAverage.update_swa", "AveragedModel"),
            ("ShadowWeights.fold(check_finite=False)", "AveragedModel"),
            ("ShadowWeights.fold", "AveragedModel"),
            ("ShadowWeights.fold", "AveragedModel, checked"),
        ):
            if kind in medians:
                ratio = medians[kind] / medians[peer]
                yield f"in-memory update, {mode}: {kind}, times {peer}", "<= 1", ratio, ratio <= 1


def _ema_peers() -> Iterator[tuple[str, str, float, bool]]:
    rows = [row for row in _load("ema_peers").get("rows", ()) if row["dtype"] == "float32"]
    seconds = {(row["size"], row["kind"]): row["median_s"] for row in rows}
    for size in dict.fromkeys(row["size"] for row in rows):
        ratio = seconds[size, "ShadowWeights, unchecked"] / seconds[size, "AveragedModel"]
        yield f"EMA of {size} float32 parameters: unchecked fold, times AveragedModel", "<= 1", ratio, ratio <= 1


def _batchnorm() -> Iterator[tuple[str, str, float, bool]]:
    if not (data := _load("batchnorm")):
        return
    ratio = median(data["seconds"]["recalibrate"]) / median(data["seconds"]["update_bn"])
    yield "recalibrate, ResNet-18: times update_bn", "<= 1", ratio, ratio <= 1
    error = max(found["recalibrate"] for found in data["errors"].values())
    yield "its largest variance error on seven data sets", "<= 1e-7", error, error <= 1e-7


def _accuracy() -> Iterator[tuple[str, str, float, bool]]:
    for row in _load("accuracy").get("rows", ()):
        error = row["ulp"]["ShadowWeights, float64"]
        limit = 1 if row["dtype"] == "float32" else 0.5
        yield (
            f"{row['case']}, {row['folds']:,} folds of {row['dtype']}: units of the last place",
            f"<= {limit}",
            error,
            error <= limit,
        )


def _start_up() -> Iterator[tuple[str, str, float, bool]]:
    if found := _load("start_up"):
        ratio, target = found["ratio"], found["target"]
        yield ("POST /runs to the first step, over bare Ray Train's start", f"<= {target}", ratio, ratio <= target)


def _averager() -> Iterator[tuple[str, str, float, bool]]:
    for kind, wanted in (("one averager, undisturbed", 240), ("one averager under faults", 120)):
        if found := _load("averager_soak").get("kinds", {}).get(kind):
            rate = found["per_minute"]
            yield f"{kind}: tiny checkpoints a minute", f">= {wanted}", rate, rate >= wanted
    if data := _load("averager_lag"):
        lag = median(data["lag_s"][str(data["size_mb"])])
        yield f"{data['size_mb']:g} MB from commit to published, seconds", "< 3", lag, lag < 3
        most = max(max(found) for found in data["reads"].values())
        yield "reads of each checkpoint, whatever the number of averages", "1", most, most == 1
    for path in RESULTS.glob("averager_memory-*.json"):
        data = json.loads(path.read_text())
        peak = data["peak_rss_bytes"] / 1e6
        yield (
            f"{data['size_bytes'] / 1e9:.2g} GB into {data['num_averages']} averages: MB",
            "< 600",
            peak,
            peak < 600,
        )


def _checkpointing() -> Iterator[tuple[str, str, float, bool]]:
    if not (data := _load("checkpointing")):
        return
    added = {name: added_s(found) for name, found in data["methods"].items()}
    copies = added[OURS] / median(found["copy_s"] for found in data["methods"].values())
    what = "a checkpoint of 50M parameters adds to training: "
    yield f"{what}copies of the weights", f"<= {COPIES_ALLOWED:g}", copies, copies <= COPIES_ALLOWED
    if "blocking" in added:
        times = added["blocking"] / added[OURS]
        yield f"{what}times less than blocking", f">= {TIMES_BLOCKING:g}", times, times >= TIMES_BLOCKING


def _api() -> Iterator[tuple[str, str, float, bool]]:
    parts = _load("api_load").get("parts", {})
    if one := parts.get("reads"):
        yield (
            f"{one['num_clients']} clients of mixed reads: p99 in ms",
            "< 250",
            one["p99_ms"],
            one["p99_ms"] < 250,
        )
        yield "the same: errors", "0", one["errors"], one["errors"] == 0
    if one := parts.get("list"):
        yield "pages of runs: p99 in ms", "< 100", one["p99_ms"], one["p99_ms"] < 100
    if one := parts.get("submissions"):
        is_met = one["num_runs"] == one["num_keys"] == one["keys_with_one_run"]
        yield "runs of 1,000 keys, each sent twice", str(one["num_keys"]), one["num_runs"], is_met
        yield "the same, sent within 20 s: answered after s", "< 22", one["took_s"], one["took_s"] < 22
    if one := parts.get("sse"):
        grown = one["rss_growth_bytes"] / 1e6
        yield f"{one['num_clients']} streams: longest delay in ms", "< 2000", one["max_ms"], one["max_ms"] < 2000
        yield "the same: memory grew by MB", "< 50", grown, grown < 50
    if one := parts.get("downloads"):
        peak = one["peak_rss_bytes"] / 1e6
        for how, ratio in one["ratios"].items():
            yield f"{one['num']} downloads at once, {how}, over straight", ">= 0.8", ratio, ratio >= 0.8
        yield "the same: the API's memory in MB", "< 300", peak, peak < 300


def _without_title(text: str) -> str:
    first, _, rest = text.partition("\n")
    return rest if first.startswith("# ") else text


if __name__ == "__main__":
    main()
