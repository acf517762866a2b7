from __future__ import annotations

import io
import socket
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, BinaryIO, cast

import httpx2
import pytest

from support.patience import eventually
from support.seaweed import running_seaweed
from support.store_contract import LARGE, StoreContract
from wa_core.errors import (
    AlreadyExistsError,
    ConfigurationError,
    FencedError,
    ObjectNotFoundError,
    StoreAuthError,
    StoreUnavailableError,
)
from wa_core.store.hashed import HashedFile
from wa_core.store.parts import InParts
from wa_core.store.s3 import S3Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.seaweed import Seaweed


class TestS3Store(StoreContract):
    """S3, as a real SeaweedFS speaks it, keeps the contract."""

    @pytest.fixture
    def store(self, seaweed: Seaweed) -> S3Store:
        """A store on an empty bucket, which sends what is over 5 MiB in parts."""
        bucket = seaweed.new_store().bucket
        return seaweed.store_at(seaweed.endpoint_url, bucket=bucket, multipart_bytes=5 << 20)

    def test_making_a_bucket_twice_is_no_error(self, store: S3Store) -> None:
        """The bucket may be there already, and two processes may make it at once."""
        threads = [threading.Thread(target=store.ensure_bucket) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.ensure_bucket()

        store.put("k", b"")
        assert store.get("k") == b""

    def test_what_shall_be_sent_in_parts_is(self, seaweed: Seaweed) -> None:
        """The probe tries a multipart upload though its object is far below the size that needs one."""
        store = seaweed.new_store()

        store.put("k", InParts(LARGE))
        store.put("whole", io.BytesIO(LARGE))

        assert store.get("k") == LARGE
        tags = [store._data.head_object(Bucket=store.bucket, Key=key)["ETag"] for key in ("k", "whole")]
        assert [tag.endswith('-2"') for tag in tags] == [True, False]  # S3 tells the number of parts

    def test_a_hashed_file_is_checked_by_the_server(self, store: S3Store, tmp_path: Path) -> None:
        """A file with a digest arrives whole; one that is not what its digest says is not stored."""
        path = tmp_path / "file"
        path.write_bytes(b"sound" * 200_000)
        with path.open("rb", buffering=0) as file:
            hashed = HashedFile(file)
            store.put("sound", cast("BinaryIO", hashed))
            path.write_bytes(b"wrong" * 200_000)
            with pytest.raises(StoreUnavailableError, match="BadDigest"):
                store.put("wrong", cast("BinaryIO", hashed))

        assert store.get("sound") == b"sound" * 200_000
        assert [found.key for found in store.list("")] == ["sound"]

    def test_an_upload_ends_with_what_its_watcher_raises(self, store: S3Store, tmp_path: Path) -> None:
        """What is raised while a file is read for sending reaches the caller as it is, and nothing is stored."""
        path = tmp_path / "file"
        path.write_bytes(LARGE[: 1 << 20])
        is_over = False

        def watch() -> None:
            if is_over:
                raise FencedError("a newer attempt has taken over")

        with path.open("rb", buffering=0) as file:
            hashed = HashedFile(file, watch)
            is_over = True
            with pytest.raises(FencedError):
                store.put("k", cast("BinaryIO", hashed))

        assert list(store.list("")) == []

    def test_presigned_urls_read_without_credentials(self, store: S3Store) -> None:
        """A presigned URL reads the object with plain HTTP; without its signature it is refused."""
        store.put("a b/é", b"body")
        url = store.presign("a b/é", expires_s=60)
        assert url is not None

        signed, unsigned = httpx2.get(url), httpx2.get(url.partition("?")[0])

        assert signed.content == b"body"
        assert unsigned.status_code == 403

    def test_presigned_urls_name_the_public_endpoint(self, seaweed: Seaweed) -> None:
        """URLs are made for the address that users can reach, signed with version 4."""
        store = S3Store(
            bucket="weights",
            endpoint_url=seaweed.endpoint_url,
            public_endpoint_url="https://s3.example.org",
            access_key=seaweed.access_key,
            secret_key=seaweed.secret_key,
        )

        url = store.presign("k", expires_s=60)

        assert url is not None
        assert url.startswith("https://s3.example.org/weights/k?X-Amz-Algorithm=AWS4-HMAC-SHA256")

    @pytest.mark.parametrize(("access_key", "secret_key"), [("nobody", "x" * 20), (None, "wrong-secret-key")])
    def test_wrong_credentials_are_refused(
        self, seaweed: Seaweed, access_key: str | None, secret_key: str
    ) -> None:
        """An unknown key and a wrong secret raise `storage_auth` from every operation, and print no secret."""
        store = S3Store(
            bucket="weights",
            endpoint_url=seaweed.endpoint_url,
            access_key=access_key or seaweed.access_key,
            secret_key=secret_key,
        )

        for call in (
            lambda: store.get("k"),
            lambda: store.head("k"),
            lambda: store.put("k", b""),
            lambda: store.put("k", LARGE),
            lambda: store.create("k", b""),
            lambda: store.delete("k"),
            lambda: list(store.list("")),
            lambda: store.stream("k"),
            store.ensure_bucket,
        ):
            with pytest.raises(StoreAuthError, match="WA_S3_SECRET_KEY") as refused:
                call()
            assert secret_key not in str(refused.value)

    def test_a_missing_bucket_is_the_operators_business(self, seaweed: Seaweed) -> None:
        """A bucket that does not exist is a configuration error that names it, not a missing object."""
        store = S3Store(
            bucket="never-made",
            endpoint_url=seaweed.endpoint_url,
            access_key=seaweed.access_key,
            secret_key=seaweed.secret_key,
        )

        for call in (
            lambda: store.get("k"),
            lambda: store.create("k", b""),
            lambda: store.put("k", LARGE),
            lambda: list(store.list("")),
        ):
            with pytest.raises(ConfigurationError, match="never-made"):
                call()

    @pytest.mark.parametrize("bucket", ["wa", "Weights", "a_b", "x" * 64, "", "a/b"])
    def test_impossible_bucket_names_are_refused(self, bucket: str) -> None:
        """A name that S3 does not allow is refused before anything is sent."""
        with pytest.raises(ConfigurationError, match="3 to 63"):
            S3Store(bucket=bucket)

    def test_impossible_endpoints_are_refused(self) -> None:
        """An endpoint that is no URL is refused, and the message says how to write one."""
        with pytest.raises(ConfigurationError, match="http://host:port"):
            S3Store(bucket="weights", endpoint_url="nonsense", access_key="a", secret_key="b")

    def test_a_store_that_is_away_is_unavailable(self) -> None:
        """Nobody listening is a passing error, of reads and of commits, and a file is set back to its start."""
        with socket.socket() as held:  # bound but not listening: connections are refused
            held.bind(("127.0.0.1", 0))
            store = S3Store(
                bucket="weights",
                endpoint_url=f"http://127.0.0.1:{held.getsockname()[1]}",
                access_key="a",
                secret_key="b",
            )

            with pytest.raises(StoreUnavailableError, match="is it running"):
                store.create("k", b"")
            with pytest.raises(StoreUnavailableError, match="is it running"):
                store.get("k")


class TestAnswers:
    """How answers of a server that misbehaves are understood."""

    @pytest.mark.parametrize(("status", "kind"), [(403, StoreAuthError), (404, ObjectNotFoundError)])
    def test_a_refusal_in_a_foreign_form_is_understood(
        self, scripted: Scripted, status: int, kind: type[Exception]
    ) -> None:
        """A proxy that refuses with a page of HTML is told by its status."""
        scripted.answers = [(status, {}, b"<html><br></html>")]

        with pytest.raises(kind):
            scripted.store.get("k")

    def test_a_broken_download_is_unavailable(self, scripted: Scripted) -> None:
        """A body that ends before its promised length breaks the stream; the bytes so far were given out."""
        scripted.answers = [(200, {"Content-Length": "100"}, b"x" * 40)]
        chunks = scripted.store.stream("k")

        received = []
        with pytest.raises(StoreUnavailableError):
            received.extend(chunks)

        scripted.answers = [(200, {"Content-Length": "100"}, b"x" * 40)] * 3
        with pytest.raises(StoreUnavailableError):
            scripted.store.get("k")

    @pytest.mark.parametrize("promised", ["40", "100"])
    def test_memory_holds_what_came_before_a_break(self, scripted: Scripted, promised: str) -> None:
        """Of a body that breaks off, what was counted is in place; one of the promised length ends quietly."""
        headers = {"Content-Length": promised, "Content-Range": "bytes 0-"}
        scripted.answers = [(206, headers, b"x" * 40)]
        out = bytearray(100)
        received = []

        with nullcontext() if promised == "40" else pytest.raises(StoreUnavailableError, match="60 bytes early"):
            received.extend(scripted.store.fill("k", memoryview(out)))

        assert sum(received) == 40
        assert out == b"x" * 40 + bytes(60)

    def test_ignored_ranges_are_noticed(self, scripted: Scripted) -> None:
        """A server that answers a range request with the whole object is refused, not believed."""
        scripted.answers = [(200, {"Content-Length": "4"}, b"0123")]

        with pytest.raises(ConfigurationError, match="ignores range reads"):
            scripted.store.stream("k", start=2)

    @pytest.mark.parametrize(
        ("status", "code", "expected"),
        [
            (412, "PreconditionFailed", AlreadyExistsError),
            (409, "ConditionalRequestConflict", StoreUnavailableError),
            (503, "SlowDown", StoreUnavailableError),
            (500, "InternalError", StoreUnavailableError),
            (429, "TooManyRequests", StoreUnavailableError),
            (400, "RequestTimeout", StoreUnavailableError),
            (403, "InvalidAccessKeyId", StoreAuthError),
            (403, "SignatureDoesNotMatch", StoreAuthError),
            (404, "NoSuchBucket", ConfigurationError),
            (404, "NoSuchKey", ObjectNotFoundError),
            (501, "NotImplemented", ConfigurationError),
            (400, "MalformedXML", ConfigurationError),
        ],
    )
    def test_every_answer_has_its_error(
        self, scripted: Scripted, status: int, code: str, expected: type[Exception]
    ) -> None:
        """A create is sent once, whatever the answer, and each answer becomes the error that its handler needs."""
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        scripted.answers = [(status, {"Content-Length": str(len(body))}, body)]

        with pytest.raises(expected):
            scripted.store.create("k", b"body")

        assert scripted.num_requests == 1

    def test_reads_are_tried_again(self, scripted: Scripted) -> None:
        """One overloaded answer to a read is not worth an error."""
        scripted.answers = [(503, {"Content-Length": "0"}, b""), (200, {"Content-Length": "2"}, b"ok")]

        assert scripted.store.get("k") == b"ok"
        assert scripted.num_requests == 2


class Scripted:
    """An HTTP server on a socket that gives prepared answers, one per connection."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.num_requests = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.store = S3Store(
            bucket="weights",
            endpoint_url=f"http://127.0.0.1:{self._socket.getsockname()[1]}",
            access_key="a",
            secret_key="b",
        )

    def close(self) -> None:
        """Stop serving."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            if not (received := connection.recv(65536)):
                return
            request += received
        if b"100-continue" in request.lower():
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.num_requests += 1
        status, headers, body = self.answers.pop(0)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection.sendall(f"HTTP/1.1 {status} X\r\nConnection: close\r\n{lines}\r\n".encode() + body)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """A server that answers what the test prepares."""
    server = Scripted()
    try:
        yield server
    finally:
        server.close()


def test_acknowledged_creates_survive_sigkill(tmp_path: Path) -> None:
    """While the server is killed and started again, callers hear only passing errors and lose nothing."""
    with running_seaweed(tmp_path) as server:
        store = server.new_store()
        acknowledged: list[str] = []
        unexpected: list[Exception] = []
        is_over = threading.Event()

        def write() -> None:
            number = 0
            while not is_over.is_set():
                key = f"writes/{number:06d}"
                try:
                    store.create(key, key.encode())
                    acknowledged.append(key)
                except AlreadyExistsError:
                    pass
                except StoreUnavailableError:
                    continue
                except Exception as error:  # noqa: BLE001  the test wants to see any
                    unexpected.append(error)
                number += 1

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(3):
            wait_for_more(acknowledged, by=20)
            server.kill()
            server.start()
        wait_for_more(acknowledged, by=20)
        is_over.set()
        writer.join()

        assert unexpected == []
        assert all(store.get(key) == key.encode() for key in acknowledged)
        assert {info.key for info in store.list("writes/")} >= set(acknowledged)


def wait_for_more(grows: list[str], *, by: int) -> None:
    """Wait until the list has grown."""
    wanted = len(grows) + by
    eventually(lambda: len(grows) >= wanted, what="more writes")
