"""Averager processes that are killed, stopped, starved and cut off while a run is trained on a real store."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from support.nursery import Nursery
from support.patience import eventually
from support.proxy import FaultProxy, Rule, Spoil
from support.seaweed import Seaweed, running_seaweed
from support.trained import TrainedRun
from wa_core import layout
from wa_core.catalog.averages import Generations

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wa_core.store.s3 import S3Store

STEPS = range(10, 50, 10)


class Site:
    """A bucket, a proxy before it, and a nursery whose averagers reach it through that."""

    def __init__(self, seaweed: Seaweed, proxy: FaultProxy, nursery: Nursery, store: S3Store) -> None:
        self.seaweed = seaweed
        self.proxy = proxy
        self.nursery = nursery
        self.store = store


def settings(seaweed: Seaweed, endpoint_url: str, bucket: str) -> dict[str, str]:
    """An averager's environment."""
    return {
        "WA_STORE_URL": f"s3://{bucket}",
        "WA_S3_ENDPOINT": endpoint_url,
        "WA_S3_ACCESS_KEY": seaweed.access_key,
        "WA_S3_SECRET_KEY": seaweed.secret_key,
        "WA_POLL_INTERVAL_S": "0.02",
        "WA_ACCUMULATOR_MEMORY_MB": "1",
    }


@pytest.fixture
def site(seaweed: Seaweed, proxy: FaultProxy, tmp_path: Path) -> Iterator[Site]:
    """A site on the session's server."""
    store = seaweed.new_store()
    with Nursery(tmp_path, settings(seaweed, proxy.endpoint_url, store.bucket)) as nursery:
        yield Site(seaweed, proxy, nursery, store)


@pytest.fixture
def own_site(tmp_path: Path) -> Iterator[Site]:
    """A site on a server of its own, which may be killed."""
    with running_seaweed(tmp_path / "store") as seaweed, FaultProxy(seaweed.endpoint_url) as proxy:
        store = seaweed.new_store()
        with Nursery(tmp_path, settings(seaweed, proxy.endpoint_url, store.bucket)) as nursery:
            yield Site(seaweed, proxy, nursery, store)


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.soak)], ids=["short", "long"])
def test_f1_sigkill_after_any_store_operation(site: Site, stride: int) -> None:
    """F1: killed right after the server did its n-th operation, the next one ends exact, with one orphan."""
    undisturbed = averaged(site)
    num_answers = site.proxy.num_answers
    assert num_answers > 20
    assert undisturbed.orphans() == []
    for kill_after in range(1, num_answers, stride):
        run = averaged(site, kill_after=kill_after)
        assert len(run.orphans()) <= 1, kill_after


def averaged(site: Site, *, kill_after: int | None = None) -> TrainedRun:
    """A run, averaged to its end by one averager, or by two of which the first is killed."""
    run = TrainedRun(site.store)
    run.train(STEPS)
    run.finish()
    site.proxy.forget()
    first = site.nursery.start()
    if kill_after is not None:
        site.proxy.after_answer = lambda number: first.kill() if number == kill_after else None
        status = site.nursery.wait(first)
        assert status == -9
        site.proxy.forget()
        first = site.nursery.start()
    run.wait_until_succeeded()
    eventually(lambda: is_idle(site.store), what="the end of the run")
    first.kill()
    site.nursery.wait(first)
    run.check(STEPS)
    return run


def is_idle(store: S3Store) -> bool:
    """Whether there is nothing to average."""
    return not list(store.list(layout.ACTIVE))


@pytest.mark.parametrize("service", ["services.averager", "services.trainer"])
def test_f11_nothing_commits_to_a_store_that_ignores_conditions(site: Site, service: str) -> None:
    """F11: what commits refuses to start on a store that ignores If-None-Match, and names the failed probe."""
    site.proxy.rules = [Rule(Spoil.HIDE_CONFLICT)]
    environment = os.environ | settings(site.seaweed, site.proxy.endpoint_url, site.store.bucket)

    ended = subprocess.run(
        [sys.executable, "-m", service], env=environment, capture_output=True, text=True, timeout=240, check=False
    )

    assert ended.returncode == 1
    assert "second-create-is-refused" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert not list(site.store.list(""))


class Killer:
    """Kills a random one of some averagers every now and then, and starts another in its place."""

    def __init__(self, nursery: Nursery, *, number: int, seed: int) -> None:
        self.num_kills = 0
        self._nursery = nursery
        self._chance = random.Random(seed)
        self._averagers = [nursery.start() for _ in range(number)]
        self._due_at = time.monotonic() + 0.5

    def kill_if_due(self) -> None:
        """F2's pace: every 0.2 to 0.6 seconds."""
        if time.monotonic() < self._due_at:
            return
        victim = self._averagers.pop(self._chance.randrange(len(self._averagers)))
        victim.kill()
        self._nursery.wait(victim)
        self.num_kills += 1
        self._averagers.append(self._nursery.start())
        self._due_at = time.monotonic() + self._chance.uniform(0.2, 0.6)


@pytest.mark.parametrize("num_checkpoints", [40, pytest.param(300, marks=pytest.mark.soak)], ids=["short", "long"])
def test_f2_one_of_three_killed_every_half_second(site: Site, num_checkpoints: int) -> None:
    """F2: while checkpoints keep coming, a random averager of three dies every 0.2-0.6 s; all is counted once."""
    steps = range(10, 10 * num_checkpoints + 10, 10)
    run = TrainedRun(site.store)
    killer = Killer(site.nursery, number=3, seed=num_checkpoints)

    def at_a_walk() -> None:
        killer.kill_if_due()
        time.sleep(0.05)  # a pace of training that spans some kills on the fastest machine

    run.train(steps, meanwhile=at_a_walk)
    run.finish()
    run.wait_until_succeeded(timeout_s=240, meanwhile=killer.kill_if_due)

    assert killer.num_kills >= num_checkpoints // 20
    run.check(steps)
    assert len(run.orphans()) <= killer.num_kills


def test_f3_a_zombie_is_refused(site: Site) -> None:
    """F3: stopped with the creation of a generation on its way, it is fenced by its heir, and goes on."""
    run = TrainedRun(site.store)
    second = layout.generation(run.run_id, "swa", 2)
    zombie = site.nursery.start()
    run.train([10, 20])
    eventually(lambda: newest(run) == 1, what="the first generation")
    site.proxy.rules = [Rule(Spoil.HOLD, operations=frozenset({"CREATE"}), key=second, times=1)]
    run.train([30])
    eventually(lambda: site.proxy.spoiled[Spoil.HOLD], what="the creation of the second generation")
    zombie.stop()

    heir = site.nursery.start()
    eventually(lambda: newest(run) >= 2, what="the heir's second generation")
    site.proxy.release()
    zombie.go_on()
    run.train([40])
    run.finish()
    run.wait_until_succeeded()

    eventually(lambda: zombie.said("fenced"), what="the zombie's word of it")
    assert heir.is_alive
    assert zombie.is_alive
    run.check([10, 20, 30, 40])


def newest(run: TrainedRun) -> int:
    """The number of the newest generation of the SWA, 0 before the first."""
    numbers = Generations(run.store, run.run_id, "swa").numbers()
    return numbers[-1] if numbers else 0


@pytest.mark.parametrize(
    ("num_checkpoints", "kill_every_s"),
    [(25, 2.0), pytest.param(300, 8.0, marks=pytest.mark.soak)],
    ids=["short", "long"],
)
def test_f9_the_store_is_killed_again_and_again(own_site: Site, num_checkpoints: int, kill_every_s: float) -> None:
    """F9: SIGKILL of SeaweedFS every 8 s (short: 2 s) costs time, and neither the process nor a checkpoint."""
    steps = range(10, 10 * num_checkpoints + 10, 10)
    run = TrainedRun(own_site.store)
    averager = own_site.nursery.start()
    kills: list[float] = [time.monotonic()]

    def kill_if_due() -> None:
        if time.monotonic() - kills[-1] > kill_every_s:
            own_site.seaweed.kill()
            own_site.seaweed.start()
            kills.append(time.monotonic())

    def at_a_walk() -> None:
        kill_if_due()
        time.sleep(0.15)  # a pace of training that spans some kills on the fastest machine

    run.train(steps, meanwhile=at_a_walk)
    run.finish()
    run.wait_until_succeeded(timeout_s=240)

    assert len(kills) > 1
    assert averager.is_alive
    run.check(steps)


@pytest.mark.parametrize("away_s", [2.0, pytest.param(60.0, marks=pytest.mark.soak)], ids=["short", "long"])
def test_f10_a_store_that_is_away_is_waited_for(site: Site, away_s: float) -> None:
    """F10: nothing gets through for 60 s (short: 2 s); the averager lives, and goes on where it was."""
    run = TrainedRun(site.store)
    averager = site.nursery.start()
    run.train([10, 20])
    eventually(lambda: newest(run), what="the first generation")

    site.proxy.go_down()
    run.train([30, 40])
    time.sleep(away_s)  # the fault itself
    assert averager.is_alive
    site.proxy.come_back()
    run.finish()
    run.wait_until_succeeded()

    run.check([10, 20, 30, 40])


def test_f22_no_room_for_scratch_is_said_and_waited_for(site: Site) -> None:
    """F22: with no room on the scratch disk the averager says so and tries again; with room it folds, exact."""
    run = TrainedRun(site.store, averages={"swa": "swa"})
    averager = site.nursery.start(file_size_limit=100_000)
    big = {step: {"w": torch.full((200_000,), float(step))} for step in (10, 20)}
    for step, tensors in big.items():
        run.checkpoint(step, tensors)
    run.finish()
    troubles = eventually(
        lambda: averager.said("store_away") or averager.said("run_stalled"), what="word of no room"
    )
    assert "scratch" in str(troubles[0]).lower() or "room" in str(troubles[0]).lower()
    assert averager.is_alive

    resource.prlimit(averager.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run.wait_until_succeeded()

    manifest = Generations(run.store, run.run_id, "swa").newest()
    assert manifest is not None
    assert (list(manifest.coefficients), manifest.rejected) == ([10, 20], [])


@pytest.mark.soak  # the short version is in tests/wa_core/averaging/test_streaming.py
def test_f23_memory_does_not_hold_the_accumulators(site: Site) -> None:
    """F23: with 1 MB allowed for accumulators, 256 MB of them (two averages of 64 MB checkpoints) are on disk."""
    run = TrainedRun(site.store, averages={"swa": "swa", "ema": "ema:half_life=30"})
    averager = site.nursery.start()
    averager.wait_until_ready()
    before = averager.peak_rss_bytes
    for step in (10, 20):
        run.checkpoint(step, {f"w{n}": torch.full((1 << 20,), float(step + n)) for n in range(16)})
    run.finish()
    run.wait_until_succeeded(timeout_s=200)

    assert averager.peak_rss_bytes - before < 256e6
    manifest = Generations(run.store, run.run_id, "swa").newest()
    assert manifest is not None
    assert manifest.coefficients == {10: 0.5, 20: 0.5}


def test_f29_a_key_that_is_revoked_and_given_back(own_site: Site) -> None:
    """F29: with its key revoked it says `storage_auth`, with no secret in it, and goes on after the fix."""
    run = TrainedRun(own_site.store)
    averager = own_site.nursery.start()
    run.train([10, 20])
    eventually(lambda: newest(run), what="the first generation")

    sound = own_site.seaweed.config
    own_site.seaweed.kill()
    own_site.seaweed.config = replace(sound, secret_key="another-secret-key")
    own_site.seaweed.start()
    said = eventually(lambda: averager.said("storage_auth"), what="word of the refused key")
    own_site.seaweed.kill()
    own_site.seaweed.config = sound
    own_site.seaweed.start()
    run.train([30])
    run.finish()
    run.wait_until_succeeded()

    assert "WA_S3_ACCESS_KEY" in said[0]["error"]
    assert own_site.seaweed.secret_key not in averager.log.read_text()
    run.check([10, 20, 30])
