from __future__ import annotations

import pytest

from support.store_contract import StoreContract
from wa_core.store.memory import MemoryStore


class TestMemoryStore(StoreContract):
    """The reference store keeps the contract."""

    @pytest.fixture
    def store(self) -> MemoryStore:
        """An empty store."""
        return MemoryStore()

    def test_has_no_url(self, store: MemoryStore) -> None:
        """Memory cannot be reached by a URL, and says so."""
        store.put("k", b"")

        assert store.presign("k", expires_s=60) is None
