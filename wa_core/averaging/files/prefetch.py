"""Reading ahead: a source's data in file order, fetched by a few threads into a few reused buffers.

It knows stretches and threads; not what the data is for. The invariant: every byte is read once and arrives in
order, and no more than a few buffers exist, whatever the model's size.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wa_core.averaging.buffers import new_buffer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from wa_core.averaging.buffers import Raw
    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.files.stored import Stretch

# Measured against a store on the same machine: two connections, 16 MiB ranges.
NUM_CONNECTIONS = 2
STRETCH_BYTES = 16 << 20
_SPARE_BUFFERS = 2  # one that is being used, one that is ready
_FEWEST_BYTES = 16


@contextmanager
def prefetched(
    source: FilesSource, *, stretch_bytes: int = STRETCH_BYTES, num_connections: int = NUM_CONNECTIONS
) -> Iterator[Iterator[tuple[Stretch, Raw]]]:
    """All data of `source`, stretch by stretch; each is valid until the next is asked for.

    Errors are those of `Source.read_into`. Leaving early waits for the reads under way and starts no more.
    """
    stretches = iter(source.stretches(max(stretch_bytes, _FEWEST_BYTES)))
    size = max(stretch_bytes, _FEWEST_BYTES)
    free = [new_buffer(size) for _ in range(num_connections + _SPARE_BUFFERS)]
    waiting: deque[Future[tuple[Stretch, Raw]]] = deque()

    def read(stretch: Stretch, buffer: Raw) -> tuple[Stretch, Raw]:
        source.read_stretch(stretch, buffer[: stretch.end - stretch.begin].data)
        return stretch, buffer

    with ThreadPoolExecutor(num_connections, thread_name_prefix="prefetch") as pool:

        def start() -> None:
            while free and (stretch := next(stretches, None)) is not None:
                waiting.append(pool.submit(read, stretch, free.pop()))

        def arrivals() -> Iterator[tuple[Stretch, Raw]]:
            start()
            while waiting:
                stretch, buffer = waiting.popleft().result()
                yield stretch, buffer[: stretch.end - stretch.begin]
                free.append(buffer)
                start()

        try:
            yield arrivals()
        finally:
            pool.shutdown(cancel_futures=True)
