"""The client whose caller awaits: the same calls, the same answers, the same downloads."""

from __future__ import annotations

import asyncio
import inspect
import random
from typing import TYPE_CHECKING

import pytest

from services.client import ApiError, AsyncClient, Client
from support.api import TOKEN, ApiRun, serving, submission
from support.cutting import cutting
from wa_core import layout
from wa_core.errors import CorruptError
from wa_core.records import Succeeded, TrainingFinished
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = random.Random(1).randbytes(3_000_000)


def test_both_clients_offer_the_same() -> None:
    """Whatever one client can do the other can, with the same parameters."""

    def offered(client: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in vars(client).items()
            if callable(method) and not name.startswith("_")
        }

    assert offered(AsyncClient) == offered(Client)
    assert "on_progress" in offered(Client)["download"]
    assert offered(Client)["run"] == ["self", "run_id", "wait_s"]


def test_a_run_is_submitted_and_followed_to_its_end() -> None:
    """Submitting, watching and reading work by awaiting, and many calls run at once on one client."""
    store = MemoryStore()

    async def play(url: str) -> tuple[list[str], list[str], list[str]]:
        async with AsyncClient(url, token=TOKEN) as client:
            submitted = await client.submit(submission())
            run = ApiRun(store).start()
            store.put(layout.logs_part(run.run_id, attempt=1, rank=0, part=1), b"hello\n")
            states = []
            async for seen in client.watch(run.run_id, poll_s=0.01):
                states.append(seen.state)
                run.log.append(TrainingFinished(step=0) if seen.state == "starting" else Succeeded())
                if seen.state == "finalizing":
                    break
            lines = [line.text async for line in client.follow_logs(run.run_id, poll_s=0.01)]
            ended, first = await asyncio.gather(client.wait(run.run_id), client.run(submitted.run_id))
            return [*states, ended.state, first.state], lines, [run.run_id async for run in client.all_runs()]

    with serving(store, token=TOKEN) as url:
        states, lines, run_ids = asyncio.run(play(url))

    assert states == ["starting", "finalizing", "succeeded", "queued"]
    assert lines == ["hello"]
    assert len(run_ids) == 2


def test_a_refusal_is_the_same_error() -> None:
    """`ApiError` carries status and code here too."""

    async def play(url: str) -> None:
        async with AsyncClient(url, token="wrong") as client:
            await client.runs()

    with serving(MemoryStore(), token=TOKEN) as url, pytest.raises(ApiError) as refused:
        asyncio.run(play(url))

    assert (refused.value.status, refused.value.code) == (401, "auth_invalid")


def test_a_cut_download_goes_on(tmp_path: Path) -> None:
    """Fault F30: cut at five points, only what is missing is asked for, and every bit is right."""
    cuts = (1, 700_000, 0, 1_000_000, 3)
    with cutting(WEIGHTS, cut_at=cuts) as server:
        asyncio.run(_download(server.server_address[1], tmp_path / "out"))
        ranges = server.ranges

    assert (tmp_path / "out").read_bytes() == WEIGHTS
    assert ranges[-1] == f"bytes={sum(cuts)}-"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bytes_that_are_not_what_was_promised_are_refused(tmp_path: Path) -> None:
    """When the digest does not match twice, no file appears."""
    with cutting(WEIGHTS, is_lying=True) as server, pytest.raises(CorruptError):
        asyncio.run(_download(server.server_address[1], tmp_path / "out"))

    assert list(tmp_path.iterdir()) == []


def test_raw_weights_are_downloaded_alike(tmp_path: Path) -> None:
    """A cut download of a checkpoint goes on, too."""

    async def download(port: int) -> Path:
        async with AsyncClient(f"http://127.0.0.1:{port}") as client:
            return await client.download_raw("RUN", tmp_path / "out", step=20)

    with cutting(WEIGHTS, cut_at=(5,)) as server:
        assert asyncio.run(download(server.server_address[1])).read_bytes() == WEIGHTS


async def _download(port: int, path: Path) -> None:
    async with AsyncClient(f"http://127.0.0.1:{port}") as client:
        await client.download("RUN", "swa", path)
