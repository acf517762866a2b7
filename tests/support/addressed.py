"""A bucket in memory that says, as S3 does, where its objects can be had without the service."""

from __future__ import annotations

from wa_core.store.memory import MemoryStore


class AddressedStore(MemoryStore):
    """A store whose objects are all said to be at `address`, where nothing need be."""

    address = "http://127.0.0.1:9"  # where nothing listens

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """An address."""
        return f"{self.address}/{key}?expires={expires_s}"
