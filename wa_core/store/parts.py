"""A body that is sent in parts whatever its size: by it the store probe tries what only very large objects need.

It knows no store. A store that never sends in parts takes it as the file that it is.
"""

from __future__ import annotations

import io

MIN_PART_BYTES = 5 << 20  # S3's smallest part, but for the last


class InParts(io.BytesIO):
    """Bytes for `put`, to be sent in parts of 5 MiB by a store that can."""
