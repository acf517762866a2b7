"""The API under load: reads, lists, submissions, streams and downloads, with 1,000 runs in the bucket.

`python -m benchmarks.api_load` starts a real SeaweedFS and a real API (`python -m services.api`), fills the bucket
with runs and asks for:

- `reads`: 200 clients at once, each asking one thing after the other (`--pause` seconds apart), for `--seconds`;
- `list`: pages of runs, with and without filters, by four clients;
- `submissions`: 50 a second for 20 s, each sent twice with its key: there must be one run for each key;
- `sse`: 100 clients that follow runs; from the beginning of an entry's commit to its arrival at each of them;
- `downloads`: 50 of 100 MB at once, in turn straight from SeaweedFS, through the API, and by its redirects.

`--part` picks some of them, and leaves what is known of the others. Everything shares this machine. Writes
`benchmarks/results/api_load.{json,md}`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from benchmarks import results, testbed
from benchmarks.api_bucket import Bucket, fill, large_average
from benchmarks.api_server import Server, serving
from benchmarks.http_client import Answer, Connection, Follower
from support.api import submission
from support.seaweed import running_seaweed
from wa_core.catalog.runs import list_run_ids

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence


assert testbed.TESTS.is_dir()

PARTS = ("reads", "list", "submissions", "sse", "downloads")
DRAIN = Path(__file__).parent / "peer_scripts" / "drain.py"
NUM_CLIENTS, NUM_LISTERS, NUM_STREAMS, NUM_DOWNLOADS = 200, 4, 100, 50
SUBMISSIONS_PER_S = 50
IN_TIME_S = 2.0  # what has not arrived so long after the last commit is missing
_SWITCH_S = 0.0002  # 5 ms by default: so long the thread that trains would hold up the clients that measure
LISTS = ("", "?limit=20", "?state=running", "?state=succeeded&limit=20", "?label=team:vision", "?owner=default")


def latencies(found: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median, 95th and 99th percentile, and the longest."""
    cuts = quantiles(found, n=100) if len(found) > 1 else [*found] * 99
    return {
        "p50_ms": cuts[49] * 1e3,
        "p95_ms": cuts[94] * 1e3,
        "p99_ms": cuts[98] * 1e3,
        "max_ms": max(found) * 1e3,
    }


class Load:
    """Clients that ask for a while, and what they saw."""

    def __init__(self, url: str, *, seconds: float, pause_s: float) -> None:
        self.url = url
        self.ends_at = time.perf_counter() + seconds
        self.seconds = seconds
        self.pause_s = pause_s
        self.took: dict[str, list[float]] = {}
        self.statuses: Counter[int] = Counter()

    async def client(self, draw: random.Random, choose: Callable[[random.Random], tuple[str, str]]) -> None:
        """Ask one thing after the other, until the time is over."""
        etags: dict[str, str] = {}
        async with Connection(self.url) as connection:
            await asyncio.sleep(draw.uniform(0, self.pause_s))
            while time.perf_counter() < self.ends_at:
                kind, path = choose(draw)
                known = {"If-None-Match": etags[path]} if path in etags and draw.random() < 0.5 else {}
                began = time.perf_counter()
                answer = await connection.ask("GET", path, headers=known)
                self.took.setdefault(kind, []).append(time.perf_counter() - began)
                self.statuses[answer.status] += 1
                if etag := answer.headers.get("etag"):
                    etags[path] = etag
                if self.pause_s:
                    await asyncio.sleep(draw.expovariate(1 / self.pause_s))

    def summary(self) -> dict[str, Any]:
        """What they saw, together and by kind."""
        every = [one for kind in self.took.values() for one in kind]
        errors = sum(number for status, number in self.statuses.items() if status not in {200, 304})
        by_kind = {kind: latencies(found) | {"num": len(found)} for kind, found in sorted(self.took.items())}
        return {
            "num_requests": len(every),
            "per_s": len(every) / self.seconds,
            "errors": errors,
            "statuses": dict(self.statuses),
            **latencies(every),
            "by_kind": by_kind,
        }


def mixed(bucket: Bucket) -> Callable[[random.Random], tuple[str, str]]:
    """What a client of mixed reads asks for next."""
    kinds = ("run", "list", "averages", "average", "events", "checkpoints", "metrics")

    def choose(draw: random.Random) -> tuple[str, str]:
        kind = draw.choices(kinds, weights=(40, 15, 10, 15, 10, 5, 5))[0]
        of_run = f"/v1/runs/{draw.choice(bucket.run_ids)}"
        paths = {
            "run": of_run,
            "list": f"/v1/runs{draw.choice(LISTS)}",
            "averages": f"{of_run}/averages",
            "average": f"{of_run}/averages/swa",
            "events": f"{of_run}/events",
            "checkpoints": f"{of_run}/checkpoints",
            "metrics": f"{of_run}/metrics",
        }
        return kind, paths[kind]

    return choose


def seeded(number: int) -> random.Random:
    """The randomness of one client."""
    return random.Random(number)  # noqa: S311  load, no secret


async def warm_up(url: str) -> float:
    """Seconds of a walk through all pages by a replica that knows nothing yet."""
    began, after = time.perf_counter(), ""
    async with Connection(url) as connection:
        while True:
            answer = await connection.ask("GET", f"/v1/runs?limit=200{after}")
            if not answer.json()["has_more"]:
                return time.perf_counter() - began
            after = f"&after={answer.json()['next']}"


async def measure_reads(bucket: Bucket, server: Server, *, seconds: float, pause_s: float) -> dict[str, Any]:
    """200 clients of mixed reads, while ten runs train."""
    walk_s = await warm_up(server.url)
    load = Load(server.url, seconds=seconds, pause_s=pause_s)
    training = asyncio.create_task(bucket.train(every_s=1.0))
    await asyncio.gather(*(load.client(seeded(n), mixed(bucket)) for n in range(NUM_CLIENTS)))
    training.cancel()
    return load.summary() | {"num_clients": NUM_CLIENTS, "pause_s": pause_s, "first_walk_s": walk_s}


async def measure_list(bucket: Bucket, server: Server, *, seconds: float) -> dict[str, Any]:
    """Pages of runs."""
    await warm_up(server.url)
    load = Load(server.url, seconds=seconds, pause_s=0.05)

    def choose(draw: random.Random) -> tuple[str, str]:
        query = draw.choice(LISTS)
        return query or "(all)", f"/v1/runs{query}"

    training = asyncio.create_task(bucket.train(every_s=1.0))
    await asyncio.gather(*(load.client(seeded(n), choose) for n in range(NUM_LISTERS)))
    training.cancel()
    return load.summary() | {"num_clients": NUM_LISTERS}


async def measure_submissions(bucket: Bucket, server: Server, *, seconds: float) -> dict[str, Any]:
    """Each key twice: half of them at once, half after the first answer."""
    num = round(SUBMISSIONS_PER_S * seconds)
    before = set(await asyncio.to_thread(list_run_ids, bucket.store))
    took: list[float] = []
    statuses: Counter[int] = Counter()
    named: dict[str, set[str]] = {}
    connections: asyncio.Queue[Connection] = asyncio.Queue()
    body = json.dumps(submission()).encode()

    async def send(key: str) -> None:
        connection = await connections.get()
        try:
            while True:
                began = time.perf_counter()
                answer: Answer = await connection.ask(
                    "POST", "/v1/runs", headers={"Idempotency-Key": key}, body=body
                )
                statuses[answer.status] += 1
                if answer.status != 409:
                    break
                await asyncio.sleep(float(answer.headers["retry-after"]))
        finally:
            connections.put_nowait(connection)
        took.append(time.perf_counter() - began)
        named.setdefault(key, set()).add(answer.json()["run_id"] if answer.status == 202 else "none")

    async def twice(number: int) -> None:
        key = f"load-{number}"
        if number % 2:
            await asyncio.gather(send(key), send(key))
        else:
            await send(key)
            await send(key)

    for _ in range(128):
        connections.put_nowait(await Connection(server.url).__aenter__())
    began = time.perf_counter()
    sent = await paced(twice, num=num, per_s=SUBMISSIONS_PER_S)
    lasted_s = time.perf_counter() - began
    made = set(await asyncio.to_thread(list_run_ids, bucket.store)) - before
    await asyncio.gather(*sent)
    return {
        "num_keys": num,
        "num_runs": len(made),
        "keys_with_one_run": sum(len(ids) == 1 and "none" not in ids for ids in named.values()),
        "took_s": lasted_s,
        "statuses": dict(statuses),
        **latencies(took),
    }


async def paced(work: Callable[[int], Awaitable[None]], *, num: int, per_s: float) -> list[asyncio.Task[None]]:
    """Begin `num` times, so many a second, whatever becomes of them; return once all are done."""
    began, tasks = time.perf_counter(), []
    for number in range(num):
        await asyncio.sleep(max(0.0, began + number / per_s - time.perf_counter()))
        tasks.append(asyncio.ensure_future(work(number)))
    await asyncio.gather(*tasks)
    return tasks


async def measure_sse(bucket: Bucket, server: Server, *, seconds: float) -> dict[str, Any]:
    """Delays from the commit of an entry to its arrival, and what the clients add to the API's memory."""
    before = server.rss_bytes()
    followers = [Follower(id_) for id_ in itertools.islice(itertools.cycle(bucket.training_ids), NUM_STREAMS)]
    clients = [asyncio.create_task(follower.follow(server.url)) for follower in followers]
    async with asyncio.timeout(30):
        await asyncio.gather(*(follower.is_told.wait() for follower in followers))
    bucket.committed_at.clear()  # what other parts have committed is no news
    training = asyncio.create_task(bucket.train(every_s=1.0))
    await asyncio.sleep(seconds)
    training.cancel()
    await asyncio.sleep(IN_TIME_S)
    after = server.rss_bytes()
    for client in clients:
        client.cancel()
    expected = [(one.arrived.get(seq), at) for one in followers for seq, at in bucket.commits_of(one.run_id)]
    delays = [arrived - at for arrived, at in expected if arrived is not None]
    return {
        "num_clients": NUM_STREAMS,
        "num_expected": len(expected),
        "num_events": len(delays),
        "rss_growth_bytes": after - before,
        **latencies(delays),
    }


def wait_until_served(url: str) -> None:
    """Wait until the API has seen that a file was published: it may have looked a moment before."""
    while True:
        try:
            urlopen(Request(url, method="HEAD"), timeout=10).close()  # noqa: S310  our own
        except HTTPError:
            time.sleep(0.5)
        else:
            return


def measure_downloads(bucket: Bucket, server: Server, *, size_mb: float, rounds: int) -> dict[str, Any]:
    """Seconds of 50 downloads at once, straight and through the API, in turn."""
    run_id, key, size_bytes = large_average(bucket.store, size_bytes=round(size_mb * 1e6))
    straight = bucket.store.presign(key, expires_s=3600)
    file = f"{server.url}/v1/runs/{run_id}/averages/swa/weights.safetensors?at=latest"
    urls = {"straight": straight, "api": file, "redirected": f"{file}&redirect=1"}
    wait_until_served(file)
    took: dict[str, list[float]] = {name: [] for name in urls}
    for number in range(rounds):
        for name in list(urls) if number % 2 else list(urls)[::-1]:
            argv = [sys.executable, str(DRAIN), str(urls[name]), str(NUM_DOWNLOADS), str(size_bytes)]
            done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
            took[name].append(float(done.stdout))
            print(f"{NUM_DOWNLOADS} downloads, {name}: {took[name][-1]:.2f} s", file=sys.stderr)
    total = NUM_DOWNLOADS * size_bytes
    return {
        "num": NUM_DOWNLOADS,
        "size_mb": size_mb,
        "took_s": took,
        "mb_per_s": {name: total / 1e6 / median(found) for name, found in took.items()},
        "ratios": {name: median(took["straight"]) / median(took[name]) for name in ("api", "redirected")},
        "peak_rss_bytes": server.peak_rss_bytes(),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All parts that are wanted, each with an API of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as name, running_seaweed(Path(name) / "store") as seaweed:
        bucket = fill(seaweed.new_store(), num_runs=options.runs)
        for part in options.part or PARTS:
            with serving(seaweed, bucket.store.bucket, Path(name) / f"{part}.log") as server:
                found[part] = measure_part(part, bucket, server, options)
                found[part]["api_cpu_s"] = server.cpu_s()
                found[part]["api_peak_rss_bytes"] = server.peak_rss_bytes()
            print(f"{part}: {found[part]}", file=sys.stderr)
    return {"num_runs": options.runs, "parts": found}


def measure_part(part: str, bucket: Bucket, server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """One part."""
    seconds = options.seconds
    if part == "reads":
        return asyncio.run(measure_reads(bucket, server, seconds=seconds or 60, pause_s=options.pause))
    if part == "list":
        return asyncio.run(measure_list(bucket, server, seconds=seconds or 20))
    if part == "submissions":
        return asyncio.run(measure_submissions(bucket, server, seconds=seconds or 20))
    if part == "sse":
        return asyncio.run(measure_sse(bucket, server, seconds=seconds or 30))
    return measure_downloads(bucket, server, size_mb=options.size_mb, rounds=options.rounds)


def markdown(data: dict[str, Any]) -> str:
    """The table that people read."""
    parts, rows = data["parts"], []
    if one := parts.get("reads"):
        what = f"{one['num_clients']} clients of mixed reads, {one['pause_s']:g} s between requests"
        rows.append(
            [what, f"{one['per_s']:.0f} requests/s, {one['errors']} errors", f"p99 {one['p99_ms']:.0f} ms"]
        )
    if one := parts.get("list"):
        rows.append(
            ["pages of runs", f"{one['per_s']:.0f} pages/s, {one['errors']} errors", f"p99 {one['p99_ms']:.0f} ms"]
        )
    if one := parts.get("submissions"):
        what = f"{SUBMISSIONS_PER_S} submissions/s, each sent twice with its key"
        rows.append([what, f"{one['num_keys']} keys, {one['num_runs']} runs", f"p99 {one['p99_ms']:.0f} ms"])
    if one := parts.get("sse"):
        grown = round(one["rss_growth_bytes"] / 1e6)
        what = f"{one['num_clients']} clients that follow runs"
        told = f"{one['num_events']} of {one['num_expected']} updates arrived; memory grew by {grown} MB"
        rows.append([what, told, f"longest delay {one['max_ms'] / 1e3:.2f} s"])
    if one := parts.get("downloads"):
        speeds = ", ".join(f"{name} {speed:.0f} MB/s" for name, speed in one["mb_per_s"].items())
        what = f"{one['num']} downloads of {one['size_mb']:g} MB at once"
        used = f"API {one['peak_rss_bytes'] / 1e6:.0f} MB at most"
        ratios = ", ".join(f"{name} {ratio:.2f} of straight" for name, ratio in one["ratios"].items())
        rows.append([what, speeds, f"{ratios}; {used}"])
    about = f"One API process over a real SeaweedFS with {data['num_runs']} runs in the bucket"
    return (
        f"{about}; clients, API and store share the machine.\n\n{results.table(['load', 'served', 'how'], rows)}"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may repeat")
    parser.add_argument("--seconds", type=float, help="how long each part takes")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds between a reader's requests")
    parser.add_argument("--size-mb", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="only print")
    options = parser.parse_args()
    sys.setswitchinterval(_SWITCH_S)
    data = measure(options)
    if options.no_write:
        print(markdown(data))
        return
    data["parts"] = earlier_parts(data["num_runs"]) | data["parts"]
    results.write("api_load", data=data, text=markdown(data))


def earlier_parts(num_runs: int) -> dict[str, Any]:
    """What was measured before, with as many runs: parts may be measured one by one."""
    path = results.RESULTS / "api_load.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    return dict(data["parts"]) if data.get("num_runs") == num_runs else {}


if __name__ == "__main__":
    main()
