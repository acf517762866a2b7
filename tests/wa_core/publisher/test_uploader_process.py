"""The uploader's process: what is offered is committed by it, whichever of the processes dies."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from support.descendants import descendants, is_alive
from support.patience import eventually
from support.training import digits_request, log_of, start_attempt, submit_run, weights_of
from wa_core import layout
from wa_core.errors import ConflictError, FencedError, StoreAuthError, StoreUnavailableError, TransientError
from wa_core.publisher import CheckpointPublisher
from wa_core.publisher.uploader import UploaderProcess
from wa_core.store.local import LocalStore
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from support.seaweed import Seaweed

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  that nothing of ours is in it
TRAINER = """
import sys, time
from pathlib import Path
import torch
from wa_core.publisher import CheckpointPublisher
from wa_core.store.local import LocalStore

publisher = CheckpointPublisher(LocalStore(Path(sys.argv[1])), sys.argv[2], attempt=1)
publisher.offer(1, {"w": torch.ones(1_000_000)})
publisher._queue.put(None)
publisher._thread.join()
print(publisher._writer.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A bucket that other processes reach."""
    return LocalStore(tmp_path / "bucket")


@pytest.fixture
def run_id(store: LocalStore) -> str:
    """A run in its first attempt."""
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    return run_id


def uploader_of(publisher: CheckpointPublisher) -> UploaderProcess:
    """The process behind a publisher."""
    assert isinstance(publisher._writer, UploaderProcess)
    return publisher._writer


def test_files_in_s3_are_what_was_offered(seaweed: Seaweed) -> None:
    """Weights and training state arrive in a real S3 store byte for byte; what shared memory does so again."""
    store = seaweed.new_store()
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40))
    shared = torch.arange(6.0)

    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        publisher.offer(3, model, trainer_state={"all": shared, "tail": shared[2:], "step": 3})

    (entry,) = log_of(store, run_id).lineage
    assert store.get(entry.files["model.safetensors"].key) == serialize(model.state_dict())
    state = torch.load(io.BytesIO(store.get(entry.files["trainer.pt"].key)), weights_only=True)
    state["all"].fill_(7)
    assert (state["tail"] == 7).all()
    assert state["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_any_dtype_and_layout_arrives(store: LocalStore, run_id: str, dtype: torch.dtype) -> None:
    """Transposed, scalar and empty tensors of every kind give the very file that `serialize` gives."""
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.to(dtype).t(), "scalar": base.to(dtype)[0, 0], "empty": torch.empty(0, 3, dtype=dtype)}

    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        publisher.offer(1, state)

    (entry,) = log_of(store, run_id).lineage
    assert store.get(entry.files["model.safetensors"].key) == serialize(state)


def test_an_architecture_may_change_between_offers(store: LocalStore, run_id: str) -> None:
    """Memory laid out for one model is laid out anew for the next, larger or smaller; nothing stale is sent."""
    sizes = (10, 50_000, 3)
    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        for step, size in enumerate(sizes, 1):
            publisher.offer(step, {"w": torch.full((size,), float(step))}, trainer_state={"t": torch.ones(size)})

    entries = log_of(store, run_id).lineage
    assert [weights_of(store, entry)["w"].shape[0] for entry in entries] == list(sizes)
    for entry, size in zip(entries, sizes, strict=True):
        state = torch.load(io.BytesIO(store.get(entry.files["trainer.pt"].key)), weights_only=True)
        assert state["t"].shape == (size,)
    assert len({entry.spec_digest for entry in entries}) == 3


def test_f20_memory_is_used_again(store: LocalStore, run_id: str) -> None:
    """F20: with one snapshot in flight, twenty checkpoints take the memory of one, and each is committed."""
    state = {"w": torch.zeros(100_000)}
    held = set()
    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        for step in range(1, 21):
            publisher.offer(
                step, {"w": state["w"].fill_(step)}, trainer_state={"momentum": state["w"], "step": step}
            )
            held.add(sum(snapshot.size_bytes for snapshot in publisher._snapshots))

    assert max(held) < 2 * state["w"].nbytes + 10_000
    entries = log_of(store, run_id).lineage
    assert [float(weights_of(store, entry)["w"][0]) for entry in entries] == list(range(1, 21))


def test_f19_an_exception_right_after_an_offer_loses_nothing(store: LocalStore, run_id: str) -> None:
    """F19: user code that raises right after an offer leaves that checkpoint committed by the other process."""

    def user_code(publisher: CheckpointPublisher) -> None:
        publisher.offer(1, {"w": torch.ones(1_000_000)})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), CheckpointPublisher(store, run_id, attempt=1) as publisher:
        user_code(publisher)

    assert [entry.step for entry in log_of(store, run_id).lineage] == [1]


def test_f18_a_zombie_trainer_is_fenced_by_its_uploader(store: LocalStore, run_id: str) -> None:
    """F18: the process commits nothing for an attempt that is over, and the trainer hears why."""
    publisher = CheckpointPublisher(store, run_id, attempt=1)
    start_attempt(store, run_id)
    publisher.offer(1, {"w": torch.ones(3)})

    with pytest.raises(FencedError, match="attempt 2"):
        publisher.close()

    assert log_of(store, run_id).lineage == []


def test_a_late_checkpoint_of_a_failed_attempt_is_refused(store: LocalStore, run_id: str) -> None:
    """Through the process, too, a run that was recorded as failed does not come to life again."""
    from wa_core.records import AttemptFailed

    publisher = CheckpointPublisher(store, run_id, attempt=1)
    log_of(store, run_id).append(AttemptFailed(reason="test"))
    publisher.offer(1, {"w": torch.ones(3)})

    with pytest.raises(ConflictError, match="recovering"):
        publisher.close()


def test_a_killed_uploader_is_replaced(store: LocalStore, run_id: str) -> None:
    """An uploader that is killed in the middle of its work is replaced; its checkpoint is committed, once."""
    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        first = uploader_of(publisher).pid
        os.kill(first, signal.SIGSTOP)
        publisher.offer(1, {"w": torch.ones(1_000_000)})
        os.kill(first, signal.SIGKILL)
        publisher.offer(2, {"w": torch.ones(1_000_000)})
        assert uploader_of(publisher).pid != first

    assert [entry.step for entry in log_of(store, run_id).lineage] == [1, 2]


def test_an_uploader_killed_after_its_commit_commits_nothing_twice(store: LocalStore, run_id: str) -> None:
    """The same upload, written again by another process, finds its entry in the log."""
    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        uploader, snapshot = uploader_of(publisher), publisher._snapshots[0]
        publisher.offer(1, {"w": torch.ones(3)})
        eventually(lambda: len(log_of(store, run_id).lineage) == 1, what="the commit")
        (entry,) = log_of(store, run_id).lineage
        from wa_core.publisher.writer import Upload

        upload = Upload(
            entry.model_copy(update={"files": {}}),
            entry.files["model.safetensors"].key.split("/")[-2].rpartition("-")[2],
            {layout.MODEL_FILE: snapshot._model.segment.path},
        )
        os.kill(uploader.pid, signal.SIGKILL)
        eventually(lambda: not is_alive(uploader.pid), what="its death")
        uploader.write(upload)

    assert log_of(store, run_id).lineage == [entry]


def test_an_uploader_that_dies_twice_is_an_error(seaweed: Seaweed) -> None:
    """When the second process dies over the same checkpoint, too, the next call says so and what to look for."""
    store = seaweed.new_store()
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    away = seaweed.store_at("http://127.0.0.1:9", bucket=store.bucket)  # so that nothing is ever done
    publisher = CheckpointPublisher(away, run_id, attempt=1)
    first = uploader_of(publisher).pid
    publisher.offer(5, {"w": torch.ones(3)})
    os.kill(first, signal.SIGKILL)
    eventually(lambda: uploader_of(publisher).pid != first, what="another process")
    os.kill(uploader_of(publisher).pid, signal.SIGKILL)

    with pytest.raises(
        TransientError, match=r"step 5 .*killed by signal 9, twice; is there enough memory"
    ) as lost:
        publisher.close()

    assert lost.value.code == "uploader_lost"
    assert log_of(store, run_id).lineage == []


def test_the_uploader_dies_with_its_trainer(store: LocalStore, run_id: str) -> None:
    """A trainer that is killed leaves no process behind, and what was committed stays."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(store.root), run_id], stdout=subprocess.PIPE, text=True
    )
    try:
        assert trainer.stdout is not None
        uploader = int(trainer.stdout.readline())
        assert is_alive(uploader)
        trainer.kill()
        trainer.wait()
        eventually(lambda: not is_alive(uploader), what="the uploader's end")
    finally:
        trainer.kill()
        trainer.communicate()

    assert [entry.step for entry in log_of(store, run_id).lineage] == [1]


def test_nothing_is_left_after_close(store: LocalStore, run_id: str) -> None:
    """A closed publisher leaves no process, no open file and no name in shared memory."""
    weights = torch.full((100,), 5.4321e-7)  # which nothing else here holds
    files, before = open_files(), set(descendants(os.getpid()))

    with CheckpointPublisher(store, run_id, attempt=1, max_in_flight=2) as publisher:
        publisher.offer(1, {"w": weights})
        pid = uploader_of(publisher).pid
        assert names_of(weights) == []  # not even now

    assert not is_alive(pid)
    assert set(descendants(os.getpid())) <= before
    assert open_files() <= files
    assert names_of(weights) == []


def open_files() -> set[tuple[str, str]]:
    """What this process has open, each under its number."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder that is being read is one of them
            found.add((file.name, str(file.readlink())))
    return found


def names_of(weights: torch.Tensor) -> list[Path]:
    """What holds these weights in shared memory, where other processes of this machine keep theirs, too."""
    found = []
    for path in SHARED_MEMORY.rglob("*"):
        with suppress(OSError):  # gone by now, or not ours to read
            if path.is_file() and path.stat().st_size < 1 << 20 and weights.numpy().tobytes() in path.read_bytes():
                found.append(path)
    return found


def test_the_uploader_is_small_and_keeps_the_secret(seaweed: Seaweed) -> None:
    """It loads no torch; the store's secret is neither among its arguments nor in its environment."""
    store = seaweed.new_store()
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)

    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        publisher.offer(1, {"w": torch.ones(100)})
        eventually(lambda: len(log_of(store, run_id).lineage) == 1, what="the commit")
        about = Path(f"/proc/{uploader_of(publisher).pid}")
        assert "torch" not in (about / "maps").read_text()
        for name in ("cmdline", "environ"):
            assert seaweed.secret_key.encode() not in (about / name).read_bytes()


def test_what_is_sent_to_the_job_is_the_trainers_to_act_on(store: LocalStore, run_id: str) -> None:
    """SIGINT and SIGTERM do not end an uploader: the trainer may still want to flush."""
    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        publisher.offer(1, {"w": torch.ones(100)})
        eventually(lambda: len(log_of(store, run_id).lineage) == 1, what="the commit")
        pid = uploader_of(publisher).pid
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        publisher.offer(2, {"w": torch.ones(100)})

    assert uploader_of(publisher).pid == pid
    assert [entry.step for entry in log_of(store, run_id).lineage] == [1, 2]


def test_an_absent_store_surfaces_through_the_process(seaweed: Seaweed) -> None:
    """A checkpoint that cannot be uploaded in time fails the next offer, naming the step, as without a process."""
    store = seaweed.new_store()
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    away = seaweed.store_at("http://127.0.0.1:9", bucket=store.bucket)
    publisher = CheckpointPublisher(away, run_id, attempt=1, upload_deadline_s=0.5)
    publisher.offer(5, {"w": torch.ones(3)})

    with pytest.raises(StoreUnavailableError):
        publisher.offer(6, {"w": torch.ones(3)})
    with suppress(StoreUnavailableError):
        publisher.close()


def test_f29_refused_credentials_surface(seaweed: Seaweed) -> None:
    """F29: a wrong secret is said by its code, and the secret itself by nobody."""
    store = seaweed.new_store()
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    wrong = seaweed.store_at(seaweed.endpoint_url, bucket=store.bucket, secret_key="not-the-secret")
    publisher = CheckpointPublisher(wrong, run_id, attempt=1, upload_deadline_s=60)
    publisher.offer(5, {"w": torch.ones(3)})

    with pytest.raises(StoreAuthError) as refused:
        publisher.close()

    assert "not-the-secret" not in str(refused.value)
