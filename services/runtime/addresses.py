"""Which network addresses users may have this service connect to: public ones alone, unless an operator says more.

A name is looked up once, and the address that was judged is the one to connect to: looking it up again could give
another answer (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Resolve = Callable[[str, int], Sequence[str]]

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOW_32 = (1 << 32) - 1


def is_public(address: str) -> bool:
    """Whether an IP address is on the open Internet: not this machine, its network, or a cloud's metadata."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (inner := _embedded(ip)) is not None:
        return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def is_private_host(host: str) -> bool:
    """Whether a URL's host is private by its spelling alone; most are told only by `choose_address`."""
    if host.lower().rstrip(".") == "localhost" or host.lower().rstrip(".").endswith((".localhost", ".internal")):
        return True
    try:
        return not is_public(host)
    except ValueError:
        return False


def look_up(host: str, port: int) -> list[str]:
    """All addresses of a host.

    Raises:
        OSError: it has none, or nobody can say.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(where[0]) for *_, where in found))


def choose_address(host: str, port: int, *, allow_private: bool, resolve: Resolve = look_up) -> str:
    """The address to connect to for a host.

    Raises:
        OSError: it cannot be looked up.
        InvalidInputError: one of its addresses is private (`private_address`); nobody needs a host with both.
    """
    addresses = resolve(host, port)
    if not addresses:
        raise OSError(f"{host} has no address")
    if not allow_private and not all(is_public(address) for address in addresses):
        raise InvalidInputError(f"{host} is a private address, and those are not called", code="private_address")
    return addresses[0]


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address leads to, where it does."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & _LOW_32)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
