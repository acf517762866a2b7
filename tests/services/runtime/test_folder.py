"""A process's own folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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


def test_those_that_start_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    """A folder that was made a moment ago is never taken for an abandoned one."""

    def start(_number: int) -> OwnFolder:
        return OwnFolder("wa-test-", parent=tmp_path)

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(start, range(400)))

    assert {folder.path for folder in folders} == set(tmp_path.iterdir())
    for folder in folders:
        folder.close()
    assert list(tmp_path.iterdir()) == []
