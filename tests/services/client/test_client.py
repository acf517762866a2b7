from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.client import ApiError, Client, ServiceUnreachableError
from support.addressed import AddressedStore
from support.api import TOKEN, ApiRun, serving, submission
from support.cutting import CuttingServer, cutting
from support.faulty import FaultyStore
from wa_core import layout
from wa_core.errors import CorruptError, InvalidInputError
from wa_core.records import Succeeded, TrainingFinished
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.client.answers import Run

WEIGHTS = random.Random(1).randbytes(3_000_000)
OTHER = random.Random(2).randbytes(2_500_000)


@pytest.fixture
def store() -> MemoryStore:
    """An empty bucket."""
    return MemoryStore()


@pytest.fixture
def client(store: MemoryStore) -> Iterator[Client]:
    """A client of a real service over `store`."""
    with serving(store, token=TOKEN) as url, Client(url, token=TOKEN) as client:
        yield client


def published(store: MemoryStore, body: bytes = WEIGHTS) -> ApiRun:
    """A run with one published average."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=body)
    return run


def client_of(server: CuttingServer) -> Client:
    """A client of it."""
    return Client(f"http://127.0.0.1:{server.server_address[1]}")


def test_submit_watch_and_read(client: Client, store: MemoryStore) -> None:
    """A run can be submitted, found and cancelled, and everything about it read, through the client alone."""
    run_id = client.submit(submission(labels={"team": "vision"}))["run_id"]
    store.put(layout.logs_part(run_id, attempt=1, rank=0, part=1), b"hello\n")

    assert client.run(run_id).state == "queued"
    assert [run.run_id for run in client.runs(label="team:vision", state="queued").data] == [run_id]
    assert client.events(run_id).data[0].kind == "submitted"
    assert client.logs(run_id, attempt=1).data[0].text == "hello"
    assert client.metrics(run_id).data == []
    assert client.checkpoints(run_id) == []
    assert [average.name for average in client.averages(run_id)] == ["swa"]
    assert client.average(run_id, "swa").n_averaged == 0
    assert client.version().format == 1
    assert client.cancel(run_id).state == "cancelled"


def test_an_average_is_added(client: Client, store: MemoryStore) -> None:
    """Adding answers with the prediction, a dry run adds nothing, and a taken name is an error with its code."""
    run = ApiRun(store).start()

    tried = client.add_average(run.run_id, "late", "swa", dry_run=True)
    added = client.add_average(run.run_id, "late", "swa", accumulator_dtype="float32")

    assert tried["prediction"] == added["prediction"]
    assert added["prediction"]["how"] == "replay"
    assert [average["name"] for average in client.averages(run.run_id)] == ["swa", "late"]
    with pytest.raises(ApiError) as taken:
        client.add_average(run.run_id, "late", "swa")
    assert (taken.value.status, taken.value.code) == (409, "average_exists")


def test_wait_reports_every_change_until_the_end(client: Client, store: MemoryStore) -> None:
    """Waiting tells of each change and returns the ended run."""
    run = ApiRun(store).start()
    seen: list[str] = []

    def on_update(resource: Run) -> None:
        seen.append(resource.state)
        if resource.state == "starting":
            run.log.append(TrainingFinished(step=0))
        elif resource.state == "finalizing":
            run.log.append(Succeeded())

    ended = client.wait(run.run_id, on_update=on_update, poll_s=0.01)

    assert seen == ["starting", "finalizing", "succeeded"]
    assert ended["state"] == "succeeded"


def test_problems_become_typed_errors(client: Client) -> None:
    """A refusal carries the service's status, code, detail, hint and faults."""
    with pytest.raises(ApiError) as unknown:
        client.run("nothing")
    with pytest.raises(ApiError) as invalid:
        client.submit(submission(seed=-1))

    assert (unknown.value.status, unknown.value.code) == (404, "run_not_found")
    assert unknown.value.hint
    assert (invalid.value.status, invalid.value.errors[0]["pointer"]) == (422, "seed")


def test_a_wrong_token_is_an_api_error(store: MemoryStore) -> None:
    """A client without the right token is told so by the service's code."""
    with serving(store, token=TOKEN) as url:
        codes = []
        for token in (None, "wrong"):
            with Client(url, token=token) as client, pytest.raises(ApiError) as refused:
                client.runs()
            codes.append(refused.value.code)

    assert codes == ["auth_missing", "auth_invalid"]


def test_no_service_is_named_as_such() -> None:
    """Bad input 75: without a service the error is of its own kind and names the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"

    with Client(address, patience_s=0.2) as client, pytest.raises(ServiceUnreachableError, match=address):
        client.runs()


def test_another_server_is_told_from_the_service() -> None:
    """An address where something else answers is an `ApiError` that says so."""
    with (
        cutting(b"<html>welcome</html>") as server,
        client_of(server) as client,
        pytest.raises(ApiError, match="WA_API_URL"),
    ):
        client.version()


@pytest.mark.parametrize("address", ["localhost:8000", "http://", "http://[::1", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    """Bad input 76: what is no address is refused before anything is sent."""
    with pytest.raises(InvalidInputError, match="http://HOST:PORT"):
        Client(address)


@pytest.mark.parametrize("token", ["se\ncret", "secret ", "s\u00e9cret", "se\x00cret"])
def test_a_token_that_no_header_takes_is_refused_unseen(token: str) -> None:
    """Bad input 78: it cannot be sent, the refusal says where it comes from, and does not repeat it."""
    with pytest.raises(InvalidInputError, match="WA_TOKEN") as refused:
        Client("http://127.0.0.1:9", token=token)

    assert "cret" not in refused.value.message


@pytest.mark.parametrize("run_id", ["", "a/b", "../x"])
def test_what_can_be_no_id_is_not_asked_for(client: Client, run_id: str) -> None:
    """Bad input 5: an id with a slash, or none at all, would ask for something else."""
    with pytest.raises(InvalidInputError, match="no slash"):
        client.run(run_id)


def test_the_environment_names_service_and_token() -> None:
    """`from_environment` reads WA_API_URL and WA_TOKEN, and only then."""
    with Client.from_environment({"WA_API_URL": "http://127.0.0.1:1/"}) as named, Client() as default:
        assert named.base_url == "http://127.0.0.1:1"
        assert default.base_url == "http://127.0.0.1:8000"


def test_reading_waits_for_a_store_that_comes_back(store: MemoryStore) -> None:
    """A GET is tried again while the service answers 503, within the client's patience."""
    faulty = FaultyStore(store)
    run = ApiRun(store)
    with serving(faulty) as url, Client(url, patience_s=30) as client:
        faulty.is_away = True
        healer = threading.Timer(2.5, lambda: setattr(faulty, "is_away", False))
        healer.start()

        shown = client.run(run.run_id)

        healer.join()
    assert shown["run_id"] == run.run_id


def test_a_download_arrives_whole(client: Client, store: MemoryStore, tmp_path: Path) -> None:
    """A download writes just the published bytes, tells its progress, and leaves no partial file."""
    run = published(store)
    progress: list[tuple[int, int]] = []
    target = tmp_path / "swa.safetensors"

    client.download(run.run_id, "swa", target, on_progress=lambda done, total: progress.append((done, total)))

    assert target.read_bytes() == WEIGHTS
    assert progress[-1] == (len(WEIGHTS), len(WEIGHTS))
    assert [path.name for path in tmp_path.iterdir()] == ["swa.safetensors"]


@pytest.mark.parametrize(
    ("there", "cut_at"), [(WEIGHTS, ()), (WEIGHTS, (1_000_000,)), (OTHER, ())], ids=["whole", "cut", "another"]
)
def test_a_download_begins_at_the_store(tmp_path: Path, there: bytes, cut_at: tuple[int, ...]) -> None:
    """What the store has is read there, without the token; what breaks or is wrong comes from the service."""
    store = AddressedStore()
    run = published(store)
    with cutting(there, cut_at=cut_at) as server, serving(store, token=TOKEN) as url:
        store.address = f"http://127.0.0.1:{server.server_address[1]}"
        with Client(url, token=TOKEN) as client:
            client.download(run.run_id, "swa", tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == WEIGHTS
    assert server.tokens == [None]


def test_a_store_out_of_reach_is_read_through_the_service(tmp_path: Path) -> None:
    """A store's address that leads nowhere from here costs a try, and nothing else."""
    store = AddressedStore()
    run = published(store)
    with serving(store, token=TOKEN) as url, Client(url, token=TOKEN) as client:
        client.download(run.run_id, "swa", tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == WEIGHTS


def test_a_download_can_choose_its_generation(client: Client, store: MemoryStore, tmp_path: Path) -> None:
    """`at` picks the best, the latest, or the generation of a step."""
    run = published(store)
    run.checkpoint(40)
    run.fold(body=OTHER, loss=0.9)

    def download(at: str | int | None) -> bytes:
        return client.download(run.run_id, "swa", tmp_path / "out", at=at).read_bytes()

    assert [download(at) for at in (None, "latest", "best", 20, 40)] == [OTHER, OTHER, WEIGHTS, WEIGHTS, OTHER]


def test_a_download_before_any_fold_is_refused(client: Client, store: MemoryStore, tmp_path: Path) -> None:
    """Bad input 32: nothing is written when there is nothing to download yet."""
    run = ApiRun(store)

    with pytest.raises(ApiError) as refused:
        client.download(run.run_id, "swa", tmp_path / "out")

    assert refused.value.code == "no_average_yet"
    assert not (tmp_path / "out").exists()


def test_a_cut_download_goes_on(tmp_path: Path) -> None:
    """Fault F30: a download cut at five points asks only for what is missing, and ends bit for bit right."""
    cuts = (1, 700_000, 0, 1_000_000, 3)
    with cutting(WEIGHTS, cut_at=cuts) as server, client_of(server) as client:
        client.download("RUN", "swa", tmp_path / "out")
        ranges = server.ranges

    assert (tmp_path / "out").read_bytes() == WEIGHTS
    assert ranges[0] is None
    assert ranges[-1] == f"bytes={sum(cuts)}-"


def test_raw_weights_are_downloaded_alike(client: Client, store: MemoryStore, tmp_path: Path) -> None:
    """The newest checkpoint, or that of a step; a cut download of one goes on."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.checkpoint(40)

    assert client.download_raw(run.run_id, tmp_path / "raw").read_bytes() == b"checkpoint 40"
    assert client.download_raw(run.run_id, tmp_path / "raw", step=20).read_bytes() == b"checkpoint 20"
    with cutting(WEIGHTS, cut_at=(5,)) as server, client_of(server) as cut:
        assert cut.download_raw("RUN", tmp_path / "cut").read_bytes() == WEIGHTS
        assert server.ranges == [None, "bytes=5-"]


def test_a_replaced_file_starts_over(tmp_path: Path) -> None:
    """Fault F30: when the content is replaced during a cut, nothing of the old one is in the result."""
    with cutting(WEIGHTS, OTHER, cut_at=(1_000_000,)) as server, client_of(server) as client:
        client.download("RUN", "swa", tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == OTHER


@pytest.mark.parametrize("size", [1_000_000, len(WEIGHTS), len(WEIGHTS) + 5])
def test_a_corrupt_partial_download_is_fetched_again(
    client: Client, store: MemoryStore, tmp_path: Path, size: int
) -> None:
    """Bad input 83: a partial file with wrong bytes, also one too long, is noticed and fetched again."""
    run = published(store)
    etag = f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    (tmp_path / "out.part").write_bytes(random.Random(3).randbytes(size))
    (tmp_path / "out.part.etag").write_text(etag)

    client.download(run.run_id, "swa", tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == WEIGHTS


@pytest.mark.parametrize("etag", [b"", b"\xff\xfe", b'"a"\r\nX: y', b"not an etag", None], ids=str)
def test_a_note_beside_a_partial_download_that_is_none_is_forgotten(
    client: Client, store: MemoryStore, tmp_path: Path, etag: bytes | None
) -> None:
    """Bad input 83: with what makes no sense beside the part, or nothing, all is fetched again."""
    run = published(store)
    (tmp_path / "out.part").write_bytes(WEIGHTS[:1000])
    if etag is not None:
        (tmp_path / "out.part.etag").write_bytes(etag)

    client.download(run.run_id, "swa", tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == WEIGHTS
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_written_through(client: Client, store: MemoryStore, tmp_path: Path) -> None:
    """Downloading to a link changes the file that it points to, and the link stays."""
    run, link = published(store), tmp_path / "link"
    (tmp_path / "file").write_bytes(b"old")
    link.symlink_to("file")

    client.download(run.run_id, "swa", link)

    assert link.is_symlink()
    assert (tmp_path / "file").read_bytes() == WEIGHTS


def test_a_whole_partial_file_is_not_fetched_again(client: Client, store: MemoryStore, tmp_path: Path) -> None:
    """A part that was whole when the last try ended is only checked, not downloaded again."""
    run = published(store)
    (tmp_path / "out.part").write_bytes(WEIGHTS)
    (tmp_path / "out.part.etag").write_text(f'"{hashlib.sha256(WEIGHTS).hexdigest()}"')
    progress: list[int] = []

    client.download(run.run_id, "swa", tmp_path / "out", on_progress=lambda done, _: progress.append(done))

    assert (tmp_path / "out").read_bytes() == WEIGHTS
    assert progress == []


def test_bytes_that_are_not_what_was_promised_are_refused(tmp_path: Path) -> None:
    """When the digest does not match twice, the download fails and no file appears."""
    with cutting(WEIGHTS, is_lying=True) as server, client_of(server) as client, pytest.raises(CorruptError):
        client.download("RUN", "swa", tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_fails_before_downloading(tmp_path: Path) -> None:
    """Bad input 79: a place that cannot be written is refused before a byte is asked for."""
    os.mkfifo(tmp_path / "pipe")  # as /dev/null would be, it would be replaced by a file
    targets = [tmp_path, tmp_path / "no" / "such" / "folder", Path(), Path("/"), tmp_path / "pipe"]
    with cutting(WEIGHTS) as server, client_of(server) as client:
        for target in targets:
            with pytest.raises(InvalidInputError) as refused:
                client.download("RUN", "swa", target)

            assert refused.value.code == "output_not_writable"

    assert server.ranges == []
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_long_poll_may_take_longer_than_the_timeout(store: MemoryStore) -> None:
    """Waiting for a change is not cut off by the client's own timeout."""
    run = ApiRun(store)
    with serving(store) as url, Client(url, timeout_s=2.0, patience_s=0) as client:
        began_at = time.monotonic()

        shown = client.run(run.run_id, wait_s=3.0)

    assert shown["state"] == "queued"
    assert time.monotonic() - began_at >= 2.9
