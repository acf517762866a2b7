"""Posts one message to one address, and says how that went. Redirects are not followed, answers are not read.

The connection goes to the very address that was found fit to be called; TLS and the Host header still name the
host. Nothing that a receiver does holds a sender for longer than its deadline.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from services.runtime.addresses import choose_address, look_up
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from services.runtime.addresses import Resolve

_HTTPS = "https"


class UndeliverableError(Exception):
    """There is no answer; says why, without the address's path, which may hold a secret."""


class Sender:
    """Sends messages.

    Args:
        allow_private: also call private addresses, and plain http.
        deadline_s: what one message may take in all.
        resolve: looks up a host's addresses.
    """

    def __init__(self, *, allow_private: bool, deadline_s: float = 15.0, resolve: Resolve = look_up) -> None:
        self._allow_private = allow_private
        self._deadline_s = deadline_s
        self._resolve = resolve
        self._tls = ssl.create_default_context()

    def post(self, url: str, body: bytes, *, headers: Mapping[str, str]) -> int:
        """Post `body`; the status of the answer.

        Raises:
            UndeliverableError: there was none.
        """
        parts = urlsplit(url)
        if parts.scheme != _HTTPS and not self._allow_private:
            raise UndeliverableError("plain http is not used; give an https address")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == _HTTPS else 80)
            with self._connected(host, port, is_tls=parts.scheme == _HTTPS) as connection:
                connection.request("POST", target, body, dict(headers))
                return connection.getresponse().status
        except InvalidInputError as error:
            raise UndeliverableError(error.message) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UndeliverableError(f"{type(error).__name__}: {error}"[:200]) from None

    @contextmanager
    def _connected(self, host: str, port: int, *, is_tls: bool) -> Iterator[http.client.HTTPConnection]:
        address = choose_address(host, port, allow_private=self._allow_private, resolve=self._resolve)
        connection: http.client.HTTPConnection
        if is_tls:
            connection = http.client.HTTPSConnection(host, port, context=self._tls)
        else:
            connection = http.client.HTTPConnection(host, port)
        connection.auto_open = 0  # it must never connect by name
        plain = socket.create_connection((address, port), timeout=self._deadline_s)
        sock = self._wrapped(plain, host) if is_tls else plain
        # Timeouts of sockets are for each read: without this a receiver that drips bytes would hold us for ever.
        cut = threading.Timer(self._deadline_s, _cut, [sock])
        cut.daemon = True
        cut.start()
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            connection.sock = sock
            yield connection
        finally:
            cut.cancel()
            sock.close()

    def _wrapped(self, plain: socket.socket, host: str) -> ssl.SSLSocket:
        return self._tls.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)


def _cut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
