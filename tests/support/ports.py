"""Ports for servers that a test starts."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A loopback port that nothing listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
