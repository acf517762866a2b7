"""`python drain.py URL NUM SIZE`: download one URL over NUM connections at once, and print the seconds it took.

Reads into one buffer and keeps nothing, so that what is measured is the server.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from urllib.parse import urlsplit


def drain(url: str, size_bytes: int) -> None:
    """Download, from where a redirect leads if there is one, and count."""
    parts = urlsplit(url)
    buffer = bytearray(1 << 20)
    with socket.create_connection((parts.hostname, parts.port), timeout=120) as line:
        path = f"{parts.path}?{parts.query}"
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += line.recv(4096)
        status = head.split(b" ", 2)[1]
        if status == b"307":
            lines = (line.partition(b": ") for line in head.split(b"\r\n"))
            drain(next(value.decode() for name, _, value in lines if name.lower() == b"location"), size_bytes)
            return
        if status != b"200":
            raise RuntimeError(head)
        got = len(head.partition(b"\r\n\r\n")[2])
        while num := line.recv_into(buffer):
            got += num
    if got != size_bytes:
        raise RuntimeError(f"{got} of {size_bytes} bytes")


def main() -> int:
    """Download; the exit status is 1 if any came short."""
    url, num, size_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    failed: list[Exception] = []

    def one() -> None:
        try:
            drain(url, size_bytes)
        except Exception as error:  # noqa: BLE001  whatever it is, it is reported
            failed.append(error)

    threads = [threading.Thread(target=one) for _ in range(num)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(time.perf_counter() - began)
    if failed:
        sys.stderr.write(f"{len(failed)} failed: {failed[0]!r}\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
