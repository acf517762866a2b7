"""A worker killed while its uploader's process has sent half of a checkpoint to a real store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.averager.scratch import Scratch
from services.averager.verify import verify
from services.trainer.origin import find_origin
from support.averaging import averager, run_until_idle
from support.descendants import descendants, is_alive
from support.patience import eventually
from support.proxy import FaultProxy, Rule, Spoil
from support.training import (
    differing_tensors,
    digits_request,
    log_of,
    start_attempt,
    start_gloo_workers,
    submit_run,
    train_with_gloo,
    weights_of,
)
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.clock import SystemClock
from wa_core.records import TrainingFinished
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from support.seaweed import Seaweed
    from wa_core.store.base import ObjectStore
    from wa_core.store.s3 import S3Store

UPLOADER = "wa_core.publisher.child"
REQUEST = digits_request(num_workers=2, every_steps=2, averages={"swa": "swa"})  # 11 steps
THIRD = r"/checkpoints/0001-0*6-.*/model\.safetensors"


@pytest.mark.timeout(600)
def test_f15_a_worker_killed_in_the_middle_of_an_upload(
    seaweed: Seaweed, proxy: FaultProxy, tmp_path: Path
) -> None:
    """F15: training goes on from the last committed checkpoint; no process and no half file is left."""
    store = seaweed.new_store()
    near = seaweed.store_at(proxy.endpoint_url, bucket=store.bucket)
    run_id, worker = submit_run(store, REQUEST), averager(store)

    kill_in_the_middle(near, proxy, run_id)
    run_until_idle(worker)
    check_half_is_nowhere(store, run_id)
    last = log_of(store, run_id).lineage[-1]
    attempt = start_attempt(store, run_id, resumed_from=find_origin(store, log_of(store, run_id)))
    train_with_gloo(near, run_id, attempt=attempt, world_size=2)
    log_of(store, run_id).append(TrainingFinished(step=11), attempt=attempt)
    run_until_idle(worker)

    log = log_of(store, run_id)
    starts = [entry for entry in log.entries if entry.kind == "attempt_started"]
    assert (last.step, starts[-1].resumed_from) == (4, last.seq)
    assert [entry.step for entry in log.lineage] == [2, 4, 6, 8, 10, 11]
    assert differing_tensors(weights_of(store, log.lineage[-1]), undisturbed(tmp_path)) == []
    with Scratch() as scratch:
        assert verify(store, run_id, "swa", clock=SystemClock(), scratch=scratch).steps == (2, 4, 6, 8, 10, 11)


def kill_in_the_middle(near: ObjectStore, proxy: FaultProxy, run_id: str) -> None:
    """Train until half of the third checkpoint has arrived, and SIGKILL the worker that uploads it."""
    proxy.rules = [Rule(Spoil.STALL, operations=frozenset({"PUT"}), key=THIRD)]
    workers = start_gloo_workers(near, run_id, attempt=start_attempt(near, run_id), world_size=2)
    try:
        eventually(lambda: proxy.spoiled[Spoil.STALL], timeout_s=240, what="the third upload")
        (key,) = {call.key for call in proxy.calls if call.operation == "PUT" and "-000000000006-" in call.key}
        eventually(lambda: proxy.traffic[key].sent_bytes, what="the first half")
        (uploader,) = [pid for pid, line in descendants(workers[0].pid or 0).items() if UPLOADER in line]
        workers[0].kill()
        wait_for_the_end(workers, uploader)
    finally:
        for each in workers:
            each.kill()
            each.join()
    proxy.rules = []
    proxy.release()


def wait_for_the_end(workers: list[BaseProcess], uploader: int) -> None:
    """The other worker notices, and the uploader does; the memory that they shared has no name to stay by."""
    for each in workers:
        each.join(60)
    assert not any(each.is_alive() for each in workers)
    eventually(lambda: not is_alive(uploader), what="the uploader's end")


def check_half_is_nowhere(store: S3Store, run_id: str) -> None:
    """Two checkpoints are committed and folded; of the third there is no weight, and no upload is open."""
    assert [entry.step for entry in log_of(store, run_id).lineage] == [2, 4]
    manifest = Generations(store, run_id, "swa").newest()
    assert manifest is not None
    assert sorted(manifest.coefficients) == [2, 4]
    prefix = layout.checkpoints_prefix(run_id)
    weights = [info.key for info in store.list(prefix) if info.key.endswith(layout.MODEL_FILE)]
    assert len(weights) == 2
    assert "Uploads" not in store._data.list_multipart_uploads(Bucket=store.bucket)


def undisturbed(folder: Path) -> dict[str, object]:
    """The last weights of the same run that nothing happened to."""
    store = LocalStore(folder)
    run_id = submit_run(store, REQUEST)
    train_with_gloo(store, run_id, attempt=start_attempt(store, run_id), world_size=2)
    return weights_of(store, log_of(store, run_id).lineage[-1])
