"""Where messages may go: the guard on addresses, and what a bad receiver can and cannot do."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from services.notifier.sender import Sender, UndeliverableError
from services.notifier.signature import headers_of, parse_secret
from services.runtime.addresses import is_private_host, is_public
from support.receiver import KEY, SECRET, receiving
from wa_core.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",  # noqa: S104  an address to refuse
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "fd00::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_however_they_are_written(address: str) -> None:
    """This machine, its networks, a cloud's metadata, and IPv6 addresses that lead to such: none is public."""
    assert not is_public(address)
    with pytest.raises(UndeliverableError, match="private address"):
        Sender(allow_private=False, resolve=lambda _host, _port: [address]).post(
            "https://hook.example/", b"{}", headers={}
        )


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_may_be_called(address: str) -> None:
    """The open Internet is where webhooks are."""
    assert is_public(address)


@pytest.mark.parametrize(
    ("host", "is_private"),
    [("localhost", True), ("a.localhost.", True), ("10.0.0.1", True), ("::1", True), ("example.com", False)],
)
def test_some_hosts_are_private_by_their_spelling(host: str, is_private: bool) -> None:  # noqa: FBT001
    """What can be said without looking a name up is said when a run is submitted."""
    assert is_private_host(host) == is_private


def test_a_host_with_a_public_and_a_private_address_is_refused() -> None:
    """One private address among several is enough to refuse a host."""
    sender = Sender(allow_private=False, resolve=lambda _host, _port: ["8.8.8.8", "127.0.0.1"])

    with pytest.raises(UndeliverableError, match="private address"):
        sender.post("https://hook.example/", b"{}", headers={})


def test_the_address_that_was_judged_is_the_one_that_is_called() -> None:
    """DNS rebinding: a name is looked up once, and that answer is called, whatever a second one would be."""
    with receiving() as receiver:
        answers = [["127.0.0.1"], ["203.0.113.1"]]
        sender = Sender(allow_private=True, resolve=lambda _host, _port: answers.pop(0))

        status = sender.post(f"http://no-such-host.invalid:{receiver.port}/hook", b"{}", headers={})

    assert status == 204
    assert len(answers) == 1
    assert receiver.received[0].headers["host"] == f"no-such-host.invalid:{receiver.port}"


def test_plain_http_is_for_private_networks() -> None:
    """Without leave to call private addresses, only https is used."""
    with pytest.raises(UndeliverableError, match="https"):
        Sender(allow_private=False, resolve=lambda _host, _port: ["8.8.8.8"]).post(
            "http://hook.example/", b"{}", headers={}
        )


def drip(connection: socket.socket) -> None:
    """Send a byte of an endless first line now and then."""
    connection.sendall(b"HTTP/1.1 ")
    while True:
        connection.sendall(b"2")
        time.sleep(0.05)


def say_nonsense(connection: socket.socket) -> None:
    """No HTTP."""
    connection.sendall(b"\x00\xff" * 100 + b"\r\n\r\n")


def hang_up(connection: socket.socket) -> None:
    """Close at once."""


@contextmanager
def badly(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that behaves badly; its port."""

    def serve() -> None:
        try:
            connection, _ = server.accept()
            with connection:
                behave(connection)
        except OSError:
            pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


@pytest.mark.parametrize("behave", [drip, say_nonsense, hang_up])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_bad_receiver_is_an_undelivered_message_within_the_deadline(
    behave: Callable[[socket.socket], None], scheme: str
) -> None:
    """Dripping bytes, nonsense and hanging up, with TLS and without: an error that says why, in time."""
    sender = Sender(allow_private=True, deadline_s=1.0)
    began_at = time.monotonic()
    with badly(behave) as port, pytest.raises(UndeliverableError) as caught:
        sender.post(f"{scheme}://127.0.0.1:{port}/secret-path", b"{}", headers={})

    assert time.monotonic() - began_at < 10
    assert "secret-path" not in str(caught.value)


def test_a_signature_is_that_of_the_specification() -> None:
    """The example of the Standard Webhooks libraries gives the signature that they give."""
    key = parse_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    message_id, stamp, body = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'

    signed = headers_of(key, message_id=message_id, timestamp=stamp, body=body)

    assert signed["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert (signed["webhook-id"], signed["webhook-timestamp"]) == (message_id, str(stamp))


@pytest.mark.parametrize("text", ["", "whsec_", "short", "whsec_!!!!", "whsec_" + "QUFB" * 30])
def test_a_secret_that_is_none_is_refused_without_being_shown(text: str) -> None:
    """What is no base64 of 24 to 64 bytes is refused with a way to make one."""
    with pytest.raises(ConfigurationError, match="make one with") as caught:
        parse_secret(text)

    assert not text.strip() or len(text) < 7 or text not in str(caught.value)
    assert parse_secret(SECRET) == KEY
