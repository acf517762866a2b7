"""S3 and servers that speak it: the only import of boto3.

Commits (`create`) are never retried: a retried create gets 412 from its own first try, and only
`wa_core.catalog.commit` can tell that apart from a lost race. Everything else is idempotent and is retried here a
few times. Small requests and hashed files do without boto3's clients (`wa_core.store.s3_requests`); streams and
other files do not. Those go out with a CRC that the server checks but without a signature over their bytes, which
would read them once more before the first is sent.
Every botocore error is translated in one place, `_translated`; no message holds a secret.
"""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from wa_core.errors import (
    AlreadyExistsError,
    ConfigurationError,
    InvalidInputError,
    ObjectNotFoundError,
    StoreAuthError,
    StoreUnavailableError,
    UnsafeStoreError,
    WeightAveragingError,
)
from wa_core.store.base import Body, ByteRange, ObjectInfo
from wa_core.store.hashed import HashedFile
from wa_core.store.keys import check_key, roll_up
from wa_core.store.s3_requests import (
    CONNECT_TIMEOUT_S,
    MAX_CONNECTIONS,
    S3Requests,
    code_of,
    is_passing,
    status_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mypy_boto3_s3 import S3Client

CHUNK_BYTES = 1 << 20
# Larger puts are cut into parts. A server spends a quarter less on one stream than on the same bytes in parts of
# 8 MiB (measured on SeaweedFS: 2.4 CPU seconds for 200 MiB instead of 3.2), and so does this side.
MULTIPART_BYTES = 256 << 20
_PART_BYTES = 32 << 20
_NUM_PARTS_UNDER_WAY = 2  # each of them is in memory

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)


class S3Store:
    """One bucket of an S3 server. Without keys, boto3's own chain of credentials is used.

    Its methods and their errors are those of `ObjectStore`.

    Args:
        bucket: its name; `ensure_bucket` makes it.
        endpoint_url: the server, or None for AWS.
        public_endpoint_url: the address that presigned URLs are made for; None for `endpoint_url`.
        access_key: the key's id.
        secret_key: the key.
        region: the region that signatures name.
        multipart_bytes: larger puts are cut into parts.

    Raises:
        ConfigurationError: the bucket's name or an endpoint cannot be one.
    """

    def __init__(
        self,
        *,
        bucket: str,
        endpoint_url: str | None = None,
        public_endpoint_url: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        region: str = "us-east-1",
        multipart_bytes: int = MULTIPART_BYTES,
    ) -> None:
        self.bucket = _checked_name(bucket)
        self.arguments: Mapping[str, Any] = {
            "bucket": bucket,
            "endpoint_url": endpoint_url,
            "public_endpoint_url": public_endpoint_url,
            "access_key": access_key,
            "secret_key": secret_key,
            "region": region,
            "multipart_bytes": multipart_bytes,
        }
        self._region = region
        self._multipart_bytes = multipart_bytes
        self._transfer = _transfer(multipart_bytes)
        self._where = _without_user(endpoint_url) if endpoint_url else f"AWS {region}"
        signing = botocore.session.get_session()
        session = boto3.session.Session(access_key, secret_key, region_name=region, botocore_session=signing)
        self._data = _client(session, endpoint_url, tries=3, read_timeout_s=60)
        self._files = _client(session, endpoint_url, tries=3, read_timeout_s=60, sign_body=False)
        is_same = public_endpoint_url in {None, endpoint_url}
        self._public = self._data if is_same else _client(session, public_endpoint_url, tries=1, read_timeout_s=20)
        where = f"{self._data.meta.endpoint_url.rstrip('/')}/{bucket}"
        self._commits = S3Requests(signing, where, region=region, tries=1, read_timeout_s=20)
        self._small = S3Requests(signing, where, region=region, tries=3, read_timeout_s=60)

    def ensure_bucket(self) -> None:
        """Make the bucket unless it is there.

        Raises:
            StoreAuthError: it belongs to somebody else, or the credentials are refused.
        """
        with self._translated("the bucket"):
            try:
                if self._region == "us-east-1":
                    self._data.create_bucket(Bucket=self.bucket)
                else:
                    where: Any = {"LocationConstraint": self._region}
                    self._data.create_bucket(Bucket=self.bucket, CreateBucketConfiguration=where)
            except (self._data.exceptions.BucketAlreadyOwnedByYou, self._data.exceptions.BucketAlreadyExists):
                self._data.head_bucket(Bucket=self.bucket)

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read an object or a range of it."""
        if range is not None and range.end == range.start:
            self.head(key)
            return b""
        wanted = range or ByteRange(0)
        with self._translated(key):
            headers = {} if wanted == ByteRange(0) else {"Range": _range_header(wanted)}
            answer = self._small.send("GET", check_key(key), headers=headers)
        if headers:
            self._check_range(wanted, answer.headers.get("Content-Range", ""))
        body: bytes = answer.content
        return body

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes in chunks of 1 MiB."""
        wanted = ByteRange(start, end)
        if wanted.end == wanted.start:
            self.head(key)
            return iter(())
        try:
            with self._translated(key):
                opened = self._open(key, wanted)
        except InvalidInputError:  # starts at or after the object's end
            return iter(())
        return self._chunks(key, opened)

    def head(self, key: str) -> ObjectInfo:
        """Say an object's size and time."""
        with self._translated(key):
            found = self._small.send("HEAD", check_key(key)).headers
        return ObjectInfo(key, int(found["Content-Length"]), parsedate_to_datetime(found["Last-Modified"]))

    def put(self, key: str, body: Body) -> None:
        """Write an object, in parts when it is large."""
        check_key(key)
        if isinstance(body, HashedFile) and body.size_bytes <= self._multipart_bytes:
            with self._translated(key):
                self._small.send("PUT", key, body=body)
        elif not isinstance(body, bytes | bytearray | memoryview):
            self._upload(key, body)
        elif len(data := bytes(body)) > self._multipart_bytes:
            self._upload(key, io.BytesIO(data))
        else:
            with self._translated(key):
                self._small.send("PUT", key, body=data)

    def create(self, key: str, body: bytes) -> None:
        """Write an object if its key is free: one conditional PUT, one try."""
        check_key(key)
        with self._translated(key):
            try:
                self._commits.send("PUT", key, headers={"If-None-Match": "*"}, body=body)
            except ClientError as error:
                if status_of(error) == HTTPStatus.PRECONDITION_FAILED:
                    raise AlreadyExistsError(f"{key} exists already") from None
                if status_of(error) == HTTPStatus.NOT_IMPLEMENTED:
                    raise UnsafeStoreError(
                        f"the store at {self._where} does not implement conditional writes; commits need them"
                    ) from error
                raise

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """Yield the objects under a prefix, by key.

        The listing is sorted here: SeaweedFS walks folder by folder, so it yields ``ema/1`` before ``ema-2/1``,
        and it cuts `start_after` by that order too. What is asked of it is therefore a little wider.
        """
        with self._translated(prefix):
            found = sorted(self._pages(prefix, start_after, delimiter), key=lambda info: info.key)
        return roll_up(found, prefix=prefix, start_after=start_after, delimiter=delimiter)

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""
        with self._translated(key):
            self._small.send("DELETE", check_key(key))

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """A URL at the public endpoint that reads the object for `expires_s` seconds."""
        return self._presigned(self._public, key, expires_s=expires_s)

    def nearby_url(self, key: str, *, expires_s: int) -> str:
        """A URL like `presign`'s, at the endpoint that this process uses itself."""
        return self._presigned(self._data, key, expires_s=expires_s)

    def _presigned(self, client: S3Client, key: str, *, expires_s: int) -> str:
        asked = {"Bucket": self.bucket, "Key": check_key(key)}
        with self._translated(key):
            return client.generate_presigned_url("get_object", Params=asked, ExpiresIn=expires_s)

    def _open(self, key: str, wanted: ByteRange) -> Any:  # noqa: ANN401  a botocore response
        check_key(key)
        if wanted == ByteRange(0):
            return self._data.get_object(Bucket=self.bucket, Key=key)
        opened = self._data.get_object(Bucket=self.bucket, Key=key, Range=_range_header(wanted))
        self._check_range(wanted, opened.get("ContentRange", ""))
        return opened

    def _check_range(self, wanted: ByteRange, given: str) -> None:
        if not given.startswith(f"bytes {wanted.start}-"):
            raise ConfigurationError(f"the store at {self._where} ignores range reads, which this program needs")

    def _chunks(self, key: str, opened: Any) -> Iterator[bytes]:  # noqa: ANN401  a botocore response
        left = opened["ContentLength"]
        with self._translated(key), opened["Body"] as body:
            while chunk := body.read(CHUNK_BYTES):
                left -= len(chunk)
                yield chunk
        if left:
            raise StoreUnavailableError(f"{key}: the connection ended {left} bytes early; read on from there")

    def _upload(self, key: str, file: BinaryIO) -> None:
        start = file.tell() if file.seekable() else None
        try:
            with self._translated(key):
                kept_open = cast("BinaryIO", _KeptOpen(file))
                self._files.upload_fileobj(kept_open, self.bucket, key, Config=self._transfer)
        except StoreUnavailableError:
            if start is not None:
                file.seek(start)
            raise

    def _pages(self, prefix: str, start_after: str, delimiter: str | None) -> Iterator[ObjectInfo]:
        asked = {"prefix": prefix} | ({"delimiter": delimiter} if delimiter == "/" else {})
        if wider := _wider_start(prefix, start_after):
            asked["start-after"] = wider
        for kind, told in self._small.listed(asked):
            if kind == "CommonPrefixes":
                yield ObjectInfo(told["Prefix"], 0)
            elif not told["Key"].endswith("/"):  # a folder's own marker
                yield ObjectInfo(told["Key"], int(told["Size"]), datetime.fromisoformat(told["LastModified"]))

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except WeightAveragingError:
            raise
        except ClientError as error:
            raise self._from_answer(error, key) from error
        except _CREDENTIALS as error:
            raise StoreAuthError(
                f"no usable credentials for the store at {self._where}; set WA_S3_ACCESS_KEY and WA_S3_SECRET_KEY"
            ) from error
        except ParamValidationError as error:
            raise InvalidInputError(f"{key!r}: {error}") from error
        except (HTTPClientError, BotoCoreError) as error:
            raise StoreUnavailableError(
                f"{key}: the store at {self._where} did not answer ({type(error).__name__}); is it running?"
            ) from error

    def _from_answer(self, error: ClientError, key: str) -> WeightAveragingError:
        status, code = status_of(error), code_of(error)
        said = f"the store at {self._where} answered {status} {code}"
        if code == "NoSuchBucket":
            return ConfigurationError(
                f"{said}: there is no bucket {self.bucket!r}; make it, or correct WA_STORE_URL"
            )
        if status == HTTPStatus.NOT_FOUND:
            return ObjectNotFoundError(f"no object at {key}")
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return InvalidInputError(f"{key}: the range starts at or after the object's end")
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            return StoreAuthError(
                f"{said} for {key}; check WA_S3_ACCESS_KEY and WA_S3_SECRET_KEY, the key's rights and "
                "this machine's clock"
            )
        if is_passing(error):
            return StoreUnavailableError(f"{said} for {key}; it is overloaded or starting")
        return ConfigurationError(
            f"{said} for {key} ({error.operation_name}), which is not expected of an S3 store"
        )


class _KeptOpen(io.RawIOBase):
    """A file that `upload_fileobj` may read but, contrary to its habit, not close."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _checked_name(bucket: str) -> str:
    if not _BUCKET.fullmatch(bucket):
        raise ConfigurationError(
            f"{bucket!r} cannot name a bucket; S3 wants 3 to 63 lower-case letters, digits, dots and hyphens"
        )
    return bucket


def _transfer(multipart_bytes: int) -> TransferConfig:
    transfer = TransferConfig(
        multipart_threshold=multipart_bytes,
        multipart_chunksize=min(multipart_bytes, _PART_BYTES),
        max_concurrency=_NUM_PARTS_UNDER_WAY,
    )
    # One more than is being sent; ten, by default, would be read ahead of a slow line.
    transfer.max_in_memory_upload_chunks = _NUM_PARTS_UNDER_WAY + 1
    return transfer


def _client(
    session: boto3.session.Session,
    endpoint_url: str | None,
    *,
    tries: int,
    read_timeout_s: int,
    sign_body: bool = True,
) -> S3Client:
    options: Any = {"addressing_style": "path"} | ({} if sign_body else {"payload_signing_enabled": False})
    config = Config(
        signature_version="s3v4",
        s3=options,
        retries={"mode": "standard", "total_max_attempts": tries},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=read_timeout_s,
        max_pool_connections=MAX_CONNECTIONS,
        tcp_keepalive=True,
    )
    try:
        return session.client("s3", endpoint_url=endpoint_url, config=config)
    except (ValueError, BotoCoreError) as error:
        raise ConfigurationError(
            f"{_without_user(endpoint_url or '')!r} is no S3 endpoint; write http://host:port"
        ) from error


def _wider_start(prefix: str, start_after: str) -> str:
    """A `StartAfter` that misses nothing in byte order, even from a store that walks folder by folder.

    Such a store drops the folder ``ema/`` when asked to start after ``ema-2``, although ``ema/1`` sorts after
    it. Only a folder named like a beginning of the wanted name up to a character below the slash can be lost
    so; starting before the shortest such beginning is enough, and costs a handful of extra keys.
    """
    folder = prefix[: prefix.rfind("/") + 1]
    if not start_after.startswith(folder):
        return ""
    name = start_after[len(folder) :].partition("/")[0]
    stem = re.split(r"[\x00-\x2f]", name, maxsplit=1)[0][:-1]
    return folder + stem if stem else ""


def _range_header(wanted: ByteRange) -> str:
    return f"bytes={wanted.start}-{'' if wanted.end is None else wanted.end - 1}"


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
