"""The data folder: credentials are made once and kept private, one supervisor at a time."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from services.stack.state import BUCKET, DataFolder, StackState
from wa_core.errors import ConfigurationError, ConflictError

if TYPE_CHECKING:
    from pathlib import Path

STATE = StackState(
    stack_id="abc",
    supervisor_pid=1234,
    api_url="http://127.0.0.1:8000",
    s3_endpoint="http://127.0.0.1:8333",
    bucket=BUCKET,
    store_ports=(1, 2),
    ray_address="127.0.0.1:6379",
    scratch_dir="/tmp/wa-stack-x",  # noqa: S108  only a name
    is_ready=True,
)


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    """A prepared data folder."""
    found = DataFolder(tmp_path / "data")
    found.prepare()
    return found


def test_credentials_are_made_once(folder: DataFolder) -> None:
    """The second start reads what the first one made, so the bucket stays readable."""
    assert folder.credentials() == folder.credentials()


def test_credentials_of_two_folders_differ(folder: DataFolder, tmp_path: Path) -> None:
    """No secret is built in."""
    other = DataFolder(tmp_path / "other")
    other.prepare()

    ours, theirs = folder.credentials().model_dump(), other.credentials().model_dump()

    assert all(ours[name] != theirs[name] for name in ours)


def test_only_the_owner_reads_secrets(folder: DataFolder) -> None:
    """Credentials have mode 0600, in a folder of mode 0700."""
    folder.credentials()

    assert stat.S_IMODE((folder.path / "credentials.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_the_state_holds_no_secret(folder: DataFolder) -> None:
    """`stack.json` may be shown to anyone."""
    folder.write_state(STATE)
    known = folder.credentials()

    text = (folder.path / "stack.json").read_text()

    assert not any(secret in text for secret in (known.secret_key, known.token, known.ray_token))


def test_a_folder_has_one_supervisor_at_a_time(folder: DataFolder) -> None:
    """A second start is refused, and says who is there and what to do."""
    folder.write_state(STATE)

    with folder.lock(), pytest.raises(ConflictError, match=r"already runs .*1234.*wa down"), folder.lock():
        pass


def test_the_lock_is_free_again_after_its_holder(folder: DataFolder) -> None:
    """Nothing stale is left to be cleaned up by hand."""
    with folder.lock():
        assert folder.is_locked()

    assert not folder.is_locked()


def test_a_state_without_a_living_supervisor_is_no_stack(folder: DataFolder) -> None:
    """After a SIGKILL the file is still there, but nobody connects to a stack that is gone."""
    folder.write_state(STATE)

    assert folder.connection() is None


def test_a_running_stack_says_how_to_reach_it(folder: DataFolder) -> None:
    """Commands find the API's address and token through the folder."""
    folder.write_state(STATE)

    with folder.lock():
        found = folder.connection()

    assert found is not None
    assert (found.api_url, found.token) == (STATE.api_url, folder.credentials().token)
    assert found.pids == {"supervisor": 1234}


def test_the_state_of_another_version_is_still_read(folder: DataFolder) -> None:
    """An upgrade between up and down must not strand a running stack: its supervisor and marker are enough."""
    (folder.path / "stack.json").write_text('{"stack_id": "abc", "supervisor_pid": 1234, "new_field": 1}')

    state = folder.read_state()

    assert state is not None
    assert (state.stack_id, state.pids) == ("abc", {"supervisor": 1234})


def test_damaged_credentials_are_not_replaced_in_silence(folder: DataFolder) -> None:
    """New credentials would lock the user out of their own bucket, so a damaged file is an error that names it."""
    (folder.path / "credentials.json").write_text("{")

    with pytest.raises(ConfigurationError, match=r"credentials\.json"):
        folder.credentials()


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The refusal names the folder and the option."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigurationError, match=r"file/data.*--data"):
        DataFolder(tmp_path / "file" / "data").prepare()
