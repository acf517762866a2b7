"""A TCP proxy with a limited downstream rate: a slower link, on one machine.

`python -m benchmarks.throttle LISTEN_PORT TARGET_PORT BYTES_PER_S`; at SIGTERM it prints how many bytes went down.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from contextlib import suppress

_CHUNK = 1 << 17


class Link:
    """The one link that all connections share."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Wait until so many bytes have gone through."""
        with self._lock:
            now = time.monotonic()
            # A link that was idle saves nothing up, but a late wake-up of 50 ms is made good.
            self._free_at = max(self._free_at, now - 0.05) + num_bytes / self._bytes_per_s
            wait_s = self._free_at - now
            self.num_bytes += num_bytes
        if wait_s > 0:
            time.sleep(wait_s)


def pump(source: socket.socket, target: socket.socket, link: Link | None) -> None:
    """Move bytes until the source ends."""
    room = bytearray(_CHUNK)
    with suppress(OSError):
        while count := source.recv_into(room):
            if link is not None:
                link.take(count)
            target.sendall(memoryview(room)[:count])
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Serve until SIGTERM."""
    listen, target, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    link = Link(rate)
    server = socket.create_server(("127.0.0.1", listen))

    def stop(*_: object) -> None:
        print(link.num_bytes, flush=True)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    while True:
        client, _ = server.accept()
        upstream = socket.create_connection(("127.0.0.1", target))
        for source, sink, over in ((client, upstream, None), (upstream, client, link)):
            threading.Thread(target=pump, args=(source, sink, over), daemon=True).start()


if __name__ == "__main__":
    main()
