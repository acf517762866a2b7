"""A process's own folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.runtime.folder import OwnFolder

if TYPE_CHECKING:
    from pathlib import Path


def test_what_the_dead_left_goes_and_what_the_living_have_stays(tmp_path: Path) -> None:
    """A folder without a living owner is removed by the next of its kind; other folders are never touched."""
    (tmp_path / "wa-test-abandoned").mkdir()
    (tmp_path / "wa-test-abandoned" / "file").touch()
    (tmp_path / "other").mkdir()
    living = OwnFolder("wa-test-", parent=tmp_path)

    new = OwnFolder("wa-test-", parent=tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"other", living.path.name, new.path.name}
    new.close()
    living.close()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
