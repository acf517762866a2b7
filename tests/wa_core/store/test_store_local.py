from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.store_contract import StoreContract
from wa_core.errors import InvalidInputError, ObjectNotFoundError, StoreUnavailableError
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

CREATOR = """
import sys
from pathlib import Path
from wa_core.errors import AlreadyExistsError
from wa_core.store.local import LocalStore
store = LocalStore(Path(sys.argv[1]))
won = 0
for number in range(200):
    try:
        store.create(f"race/{number}", sys.argv[2].encode())
        won += 1
    except AlreadyExistsError:
        pass
print(won)
"""


class TestLocalStore(StoreContract):
    """Files in a folder keep the contract."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        """An empty store in a folder that does not exist yet."""
        return LocalStore(tmp_path / "new" / "folder")

    def test_its_folder_is_a_path_or_a_text(self, store: LocalStore) -> None:
        """A folder given as text is the same store."""
        store.put("k", b"body")

        assert LocalStore(str(store.root)).get("k") == b"body"

    def test_two_processes_never_both_win(self, store: LocalStore) -> None:
        """Two processes that create the same 200 keys win 200 times between them."""
        creators = [
            subprocess.Popen([sys.executable, "-c", CREATOR, str(store.root), name], stdout=subprocess.PIPE)
            for name in ("a", "b")
        ]

        won = [int(creator.communicate(timeout=60)[0]) for creator in creators]

        assert sum(won) == 200

    def test_unfinished_writes_are_never_listed(self, store: LocalStore) -> None:
        """What a killed writer leaves behind is in no listing, and its folder takes no keys."""
        (store.root / ".tmp" / "left-by-a-killed-writer").write_bytes(b"half")
        store.put("k", b"")

        assert [info.key for info in store.list("")] == ["k"]
        assert list(store.list(".tmp/")) == []
        with pytest.raises(InvalidInputError, match="unfinished"):
            store.get(".tmp/left-by-a-killed-writer")

    def test_writes_leave_no_temporary_file(self, store: LocalStore) -> None:
        """After writes that worked and one that was refused, no temporary file is left."""
        store.create("k", b"")
        store.put("k", b"")
        with pytest.raises(InvalidInputError, match="in the way"):
            store.put("k/below", b"")

        assert list((store.root / ".tmp").iterdir()) == []

    def test_a_folder_is_no_object(self, store: LocalStore) -> None:
        """A key that is another's folder is refused, and reads as missing."""
        store.put("a/b", b"")

        with pytest.raises(InvalidInputError, match="in the way"):
            store.put("a", b"")
        with pytest.raises(ObjectNotFoundError):
            store.head("a")

    def test_a_vanished_folder_is_unavailable(self, store: LocalStore) -> None:
        """When the store's folder is gone a write says so, and that it may work later, rather than `not found`."""
        shutil.rmtree(store.root)

        with pytest.raises(StoreUnavailableError, match="check the disk"):
            store.put("k", b"")
