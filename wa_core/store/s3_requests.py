"""Requests to an S3 server, small or of one file: signed and sent by botocore, without what boto3 does around it.

A call of a boto3 client spends most of its time on rules for endpoints, on models of requests and answers, and on
hooks (ADR 34). Here are only its signer and its connections. Knows neither keys' meaning nor this program's
errors: what fails raises botocore's, which `wa_core.store.s3` translates in one place. The invariant: a request
that may be sent again is, a few times; one that commits is sent once.
"""

from __future__ import annotations

import base64
import socket
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_plus, urlencode
from xml.etree import ElementTree as ET

import stamina
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError, ResponseStreamingError
from botocore.httpsession import URLLib3Session
from botocore.parsers import ResponseParserError
from botocore.utils import get_environ_proxies

from wa_core.store.hashed import HashedFile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import botocore.session

CONNECT_TIMEOUT_S = 5
MAX_CONNECTIONS = 128  # each of the API's calls and downloads under way has one of its own

_SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
_PASSING_CODES = {
    "ConditionalRequestConflict",
    "IncompleteBody",
    "BadDigest",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "TooManyRequests",
}
_PASSING_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
_FINDS, _KEYS = {"Contents", "CommonPrefixes"}, {"Key", "Prefix"}
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0


class S3Requests:
    """Requests about the objects of one bucket. Safe for threads.

    Args:
        session: whose credentials sign, refreshed as they expire.
        bucket_url: the bucket's address, by its path.
        region: the region that signatures name.
        tries: how often a request is sent that fails for a passing reason.
        read_timeout_s: how long an answer may take.
    """

    def __init__(
        self, session: botocore.session.Session, bucket_url: str, *, region: str, tries: int, read_timeout_s: int
    ) -> None:
        self._credentials = session.get_credentials()
        self._bucket_url = bucket_url
        self._region = region
        self._tries = tries
        options: dict[str, Any] = {  # botocore's types allow less than botocore
            "verify": session.get_config_variable("ca_bundle") or True,
            "proxies": get_environ_proxies(bucket_url),
            "timeout": (CONNECT_TIMEOUT_S, read_timeout_s),
            "max_pool_connections": MAX_CONNECTIONS,
            "socket_options": _SOCKET_OPTIONS,
        }
        self._connections = URLLib3Session(**options)

    def send(
        self,
        method: str,
        key: str = "",
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | HashedFile = b"",
    ) -> Any:  # noqa: ANN401  a botocore response
        """The answer to a request, read whole.

        Raises:
            ClientError: the server refuses.
            BotoCoreError: there was no answer, or nothing to sign with.
        """
        url = f"{self._bucket_url}/{quote(key)}" if key else self._bucket_url
        url += f"?{urlencode(query, quote_via=quote)}" if query else ""
        wanted: dict[str, Any] = {"method": method, "url": url, "headers": headers, "data": body}
        if isinstance(body, HashedFile):
            wanted["headers"] = _headers_of(body)
        try:
            return self._send_once(wanted)  # nearly always all there is to it
        except (HTTPClientError, ClientError) as error:
            if self._tries == 1 or not is_passing(error):
                raise
        for attempt in stamina.retry_context(
            on=is_passing, attempts=self._tries - 1, wait_initial=_FIRST_WAIT_S, wait_max=_LONGEST_WAIT_S
        ):
            with attempt:
                return self._send_once(wanted)
        raise AssertionError("unreachable: stamina returns or raises")

    def listed(self, query: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
        """All that a `ListObjectsV2` finds, page by page: ``Contents`` or ``CommonPrefixes``, and its fields."""
        asked = {"list-type": "2", "encoding-type": "url", **query}
        while True:
            page = _parsed(self.send("GET", query=asked).content)
            yield from ((kind, _fields(found)) for found in page if (kind := _name(found)) in _FINDS)
            told = {_name(child): child.text or "" for child in page}
            if told.get("IsTruncated") != "true":
                return
            asked["continuation-token"] = told["NextContinuationToken"]

    def _send_once(self, wanted: Mapping[str, Any]) -> Any:  # noqa: ANN401  a botocore response
        if self._credentials is None:
            raise NoCredentialsError
        request = AWSRequest(**wanted)
        if isinstance(request.data, HashedFile):
            request.data = _Blocks(request.data)
        _Signer(self._credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
        try:
            answer = self._connections.send(request.prepare())
        except HTTPClientError:
            if isinstance(request.data, _Blocks) and request.data.failure is not None:
                raise request.data.failure from None  # no fault of the line's
            raise
        if answer.status_code >= HTTPStatus.MULTIPLE_CHOICES:
            raise _refusal(answer, operation=wanted["method"])
        if wanted["method"] == "GET":
            _check_whole(answer)
        return answer


def _headers_of(body: HashedFile) -> dict[str, str | bytes]:
    """How a file is announced: the server says whether it wants it, and checks what has come."""
    checksum = base64.b64encode(bytes.fromhex(body.sha256)).decode()
    return {
        "Content-Length": str(body.size_bytes),
        "Expect": b"100-continue",  # botocore knows it as bytes
        "x-amz-checksum-sha256": checksum,
    }


class _Signer(S3SigV4Auth):
    """Takes the digest of a file from who knows it already, instead of reading it once more."""

    def payload(self, request: AWSRequest) -> str:
        """What the signature and the server's check say of the body."""
        body = request.data
        return body.sha256 if isinstance(body, _Blocks) else str(super().payload(request))


class _Blocks:
    """A file as botocore sends it: from its start, block by block."""

    def __init__(self, file: HashedFile) -> None:
        self.sha256 = file.sha256
        self.failure: Exception | None = None
        self._blocks = file.blocks()

    def read(self, size: int = -1) -> memoryview | bytes:  # noqa: ARG002  blocks are as long as they are
        """The next one, or nothing after the last."""
        try:
            return next(self._blocks, b"")
        except Exception as failure:  # the sender makes one of its own out of whatever it is
            self.failure = failure
            raise


def status_of(error: ClientError) -> int:
    """The HTTP status of a refusal."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    """The S3 error code of a refusal."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed in a moment."""
    if not isinstance(error, ClientError):
        return isinstance(error, HTTPClientError)
    status = status_of(error)
    is_known = status in _PASSING_STATUSES or code_of(error) in _PASSING_CODES
    return is_known or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def _refusal(answer: Any, *, operation: str) -> ClientError:  # noqa: ANN401  a botocore response
    """The error that a boto3 client would have raised."""
    told: dict[str, str] = {}
    with suppress(ResponseParserError):  # what stands before a server may refuse in its own way
        told = {_name(child): child.text or "" for child in _parsed(answer.content)}
    response: Any = {
        "Error": {"Code": told.get("Code", str(answer.status_code)), "Message": told.get("Message", "")},
        "ResponseMetadata": {"HTTPStatusCode": answer.status_code},
    }
    return ClientError(response, operation)


def _check_whole(answer: Any) -> None:  # noqa: ANN401  a botocore response
    promised, got = answer.headers.get("Content-Length"), len(answer.content)
    if promised is not None and int(promised) != got:
        raise ResponseStreamingError(error=f"{got} of {promised} bytes came")


def _parsed(body: bytes) -> ET.Element:
    try:
        return ET.fromstring(body)  # noqa: S314  the store's own answer, which botocore reads in the same way
    except ET.ParseError as error:
        raise ResponseParserError(f"the answer is no XML: {error}") from None


def _fields(found: ET.Element) -> dict[str, str]:
    """What a listing says of an object or a folder. Keys in it are encoded like a query's values."""
    told = {_name(child): child.text or "" for child in found}
    return told | {name: unquote_plus(told[name]) for name in _KEYS & told.keys()}


def _name(element: ET.Element) -> str:
    """An element's name without its namespace, which not every server gives."""
    return element.tag.rpartition("}")[2]
