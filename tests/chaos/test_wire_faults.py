"""An averager on a real store behind a line that fails: whatever is lost, cut or bent, the averages are exact."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import torch
from structlog.testing import capture_logs

from support.averaging import averager
from support.proxy import FaultProxy, Rule, Spoil
from support.runs import HandmadeRun
from support.trained import AVERAGES, TrainedRun
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.commit import patiently
from wa_core.errors import StoreAuthError, TransientError

if TYPE_CHECKING:
    from pathlib import Path

    from services.averager.worker import Averager
    from support.seaweed import Seaweed

STEPS = tuple(range(10, 90, 10))
SHADOWS = r"/blobs/.*/shadow"


class Bench:
    """A run in a bucket, and an averager that reaches it through the proxy."""

    def __init__(self, seaweed: Seaweed, proxy: FaultProxy) -> None:
        self.proxy = proxy
        far = seaweed.new_store()
        self.near = seaweed.store_at(proxy.endpoint_url, bucket=far.bucket)
        self.run = TrainedRun(far)

    def train(self) -> None:
        """A whole training, over before any averager looks."""
        self.run.train(STEPS)
        self.run.finish()

    def average(self, *, worker: Averager | None = None, timeout_s: float = 120.0) -> None:
        """Tick as a process does until the run has succeeded; nothing but a passing error may come out."""
        worker = worker or averager(self.near, publish_every_folds=2)

        def tick() -> None:
            with suppress(TransientError):
                worker.tick()

        self.run.wait_until_succeeded(timeout_s=timeout_s, meanwhile=tick)


@pytest.fixture
def bench(seaweed: Seaweed, proxy: FaultProxy) -> Bench:
    """A run in a bucket of its own."""
    return Bench(seaweed, proxy)


def test_without_faults_each_checkpoint_crosses_the_line_once(bench: Bench) -> None:
    """Two averages or not: of each checkpoint exactly its bytes are read, in one worker's one pass."""
    bench.train()

    bench.average()

    bench.run.check(STEPS)
    for entry in bench.run.log.lineage:
        ref = entry.files[layout.MODEL_FILE]
        assert bench.proxy.traffic[ref.key].received_bytes == ref.size_bytes


def test_f5_an_upload_that_is_bent_on_the_way_is_refused_and_sent_again(bench: Bench, tmp_path: Path) -> None:
    """F5: a file whose bits change on their way to the store is not stored so; the next try is."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 8192)
    bench.proxy.rules = [Rule(Spoil.FLIP_REQUEST, key="runs/weights", times=1)]

    with path.open("rb") as file:
        patiently(lambda: bench.near.put("runs/weights", file), patience_s=30.0)

    assert bench.proxy.spoiled[Spoil.FLIP_REQUEST] == 1
    assert bench.near.get("runs/weights") == path.read_bytes()


def test_f4_lost_answers_to_commits_change_nothing(bench: Bench) -> None:
    """F4: half of the answers to creates are lost; each is known to be the averager's own, and none fences it."""
    bench.train()
    bench.proxy.rules = [Rule(Spoil.LOSE_RESPONSE, rate=0.5, operations=frozenset({"CREATE"}))]

    with capture_logs() as logs:
        bench.average()

    assert bench.proxy.spoiled[Spoil.LOSE_RESPONSE] > 0
    assert not [line for line in logs if line["event"] == "fenced"]
    bench.run.check(STEPS)


def test_f5_lost_and_half_uploads_leave_orphans_at_worst(bench: Bench) -> None:
    """F5: a state's upload loses its answer, or half of its body; no generation names what is not whole."""
    bench.train()
    uploads = frozenset({"PUT"})
    bench.proxy.rules = [
        Rule(Spoil.LOSE_RESPONSE, rate=0.3, operations=uploads, key=SHADOWS),
        Rule(Spoil.HALF_REQUEST, rate=0.4, operations=uploads, key=SHADOWS),
    ]

    bench.average()

    assert bench.proxy.spoiled.keys() == {Spoil.LOSE_RESPONSE, Spoil.HALF_REQUEST}
    assert len(bench.run.orphans()) <= bench.proxy.spoiled.total()
    bench.run.check(STEPS)


def test_f6_bad_transfers_are_read_again(bench: Bench) -> None:
    """F6: a checkpoint that arrives with a wrong bit twice, and others that are cut, are folded all the same."""
    bench.train()
    key = bench.run.log.lineage[3].files[layout.MODEL_FILE].key
    bench.proxy.rules = [
        Rule(Spoil.FLIP, times=2, operations=frozenset({"GET"}), key=key),
        Rule(Spoil.TRUNCATE, rate=0.3, operations=frozenset({"GET"}), key="/checkpoints/|/blobs/"),
    ]

    bench.average()

    assert bench.proxy.spoiled[Spoil.FLIP] == 2
    assert bench.proxy.spoiled[Spoil.TRUNCATE] > 0
    bench.run.check(STEPS)


def test_f6_what_always_arrives_wrong_is_rejected(bench: Bench) -> None:
    """F6: a checkpoint that is wrong at every one of three reads is rejected, and the others are folded."""
    bench.train()
    bad = bench.run.log.lineage[3]
    key = bad.files[layout.MODEL_FILE].key
    bench.proxy.rules = [Rule(Spoil.FLIP, operations=frozenset({"GET"}), key=key)]

    bench.average()

    for name in AVERAGES:
        manifest = Generations(bench.run.store, bench.run.run_id, name).newest()
        assert manifest is not None
        assert [aside.step for aside in manifest.rejected] == [bad.step]
    bench.run.check([step for step in STEPS if step != bad.step])


def test_f7_an_overloaded_store_is_ridden_out(bench: Bench) -> None:
    """F7: 10 % 503, 5 % 429, 5 % 409: exact, and what is asked again is asked with growing waits in between."""
    bench.train()
    bench.proxy.rules = [
        Rule(Spoil.STATUS, rate=rate, status=status) for status, rate in ((503, 0.1), (429, 0.05), (409, 0.05))
    ]

    bench.average()

    assert bench.proxy.spoiled[Spoil.STATUS] >= 5
    assert len(bench.proxy.calls) < 20 * len(STEPS) * len(AVERAGES)
    bench.run.check(STEPS)


def slow_line(*, delay_s: float, resets: float) -> list[Rule]:
    """A line with that much latency, give or take as much, and that share of connections reset."""
    return [
        Rule(Spoil.LOSE_REQUEST, rate=resets / 2),
        Rule(Spoil.LOSE_RESPONSE, rate=resets / 2),
        Rule(Spoil.DELAY, delay_s=delay_s, spread_s=delay_s),
    ]


@pytest.mark.parametrize(
    ("delay_s", "crawl_s"), [(0.03, 0.5), pytest.param(1.0, 10.0, marks=pytest.mark.soak)], ids=["short", "long"]
)
def test_f8_a_slow_and_broken_line_only_takes_longer(bench: Bench, delay_s: float, crawl_s: float) -> None:
    """F8: latency up to 2 s (short: 0.1 s), 15 % resets, and 1 kB/s at first: exact, only slower."""
    bench.train()
    bench.proxy.rules = slow_line(delay_s=delay_s, resets=0.15)
    bench.proxy.bytes_per_s = 1_000
    worker = averager(bench.near, publish_every_folds=2)
    began = time.monotonic()
    while time.monotonic() - began < crawl_s:
        with suppress(TransientError):
            worker.tick()
    bench.proxy.bytes_per_s = None

    bench.average(worker=worker, timeout_s=280)

    assert bench.proxy.spoiled.total() > 20
    bench.run.check(STEPS)


def test_f12_commits_are_single_small_puts(seaweed: Seaweed, proxy: FaultProxy) -> None:
    """F12: nothing conditional is ever part of a multipart upload, although states are uploaded in parts."""
    far = seaweed.new_store()
    run = HandmadeRun(far, averages={"swa": "swa"})
    for step in (10, 20):
        run.checkpoint(step, {"w": torch.full((1_300_000,), float(step))})
    run.finish()
    worker = averager(seaweed.store_at(proxy.endpoint_url, bucket=far.bucket, multipart_bytes=5 << 20))
    while worker.tick():
        pass

    conditional = [call for call in proxy.calls if call.is_conditional]
    assert any(call.is_part for call in proxy.calls)
    assert {call.operation for call in conditional} == {"CREATE"}
    assert not any(call.is_part for call in conditional)
    assert max(proxy.traffic[call.key].sent_bytes for call in conditional) < 100_000


def test_f29_revoked_credentials_are_named_and_then_forgotten(bench: Bench) -> None:
    """F29: while the key is refused the error says so, with what to check; once it works, so does all else."""
    bench.train()
    worker = averager(bench.near)
    worker.tick()
    bench.proxy.rules = [Rule(Spoil.STATUS, status=403)]

    with pytest.raises(StoreAuthError, match="WA_S3_ACCESS_KEY") as refused:
        worker.tick()
    assert refused.value.kind == "storage_auth"

    bench.proxy.rules = []
    bench.average(worker=worker)
    bench.run.check(STEPS)
