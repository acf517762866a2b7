"""Ports for servers that a test starts, and the first answer from there."""

from __future__ import annotations

import httpx2

from services.stack import seaweedfs
from support.patience import eventually


def free_port() -> int:
    """A loopback port that nothing listens on just now, below those that the system gives to others meanwhile."""
    return seaweedfs.free_ports(1)[0]


def answered(url: str) -> httpx2.Response:
    """What `url` answers once something listens there."""

    def ask() -> list[httpx2.Response]:
        try:
            return [httpx2.get(url, timeout=5, trust_env=False)]
        except httpx2.TransportError:
            return []

    return eventually(ask, what=f"an answer from {url}")[0]
