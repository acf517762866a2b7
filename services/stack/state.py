"""What the embedded stack keeps in its data folder: credentials, the state of a running stack, the lock.

Knows nothing of how processes are started. `credentials.json` (mode 0600) is made once and kept, so a bucket
stays readable; `stack.json` is there while a stack runs, or after its supervisor was killed; the lock is held
by a living supervisor, and the kernel releases it however that supervisor ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from services.stack.identities import KeyPair, seaweed_config
from services.stack.leftovers import ProcessRef  # noqa: TC001  pydantic reads the annotation
from wa_core.errors import ConfigurationError, ConflictError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUCKET = "weights"
IDENTITIES = "s3.json"  # what the store's processes are known by
_LOCK_PATIENCE_S = 1.0

M = TypeVar("M", bound=BaseModel)


class Credentials(BaseModel):
    """The secrets of one data folder."""

    model_config = ConfigDict(frozen=True)

    access_key: str
    secret_key: str
    token: str
    ray_token: str


class StackState(BaseModel):
    """A stack that runs, or whose supervisor was killed; holds no secret.

    Only what it takes to end a stack is required, so that one version can end what another has started.
    """

    model_config = ConfigDict(frozen=True)

    stack_id: str
    supervisor_pid: int
    api_url: str = ""
    s3_endpoint: str = ""
    bucket: str = ""
    store_ports: tuple[int, ...] = ()
    ray_address: str = ""
    scratch_dir: str = ""
    is_ready: bool = False
    processes: dict[str, ProcessRef] = {}

    @property
    def pids(self) -> dict[str, int]:
        """The process id of every part, the supervisor included."""
        return {name: ref.pid for name, ref in self.processes.items()} | {"supervisor": self.supervisor_pid}


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach a running stack: what `wa up --json` prints."""

    api_url: str
    token: str
    s3_endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    pids: dict[str, int]


@dataclass(frozen=True, slots=True)
class DataFolder:
    """The data folder and the names in it."""

    path: Path

    @property
    def logs(self) -> Path:
        """Where every process writes its log."""
        return self.path / "logs"

    @property
    def store(self) -> Path:
        """Where the object store keeps its volumes."""
        return self.path / "store"

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            ConfigurationError: the folder cannot be made or written to.
        """
        try:
            for folder in (self.path, self.logs, self.store):
                folder.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
        except OSError as error:
            raise ConfigurationError(
                f"cannot use the data folder {self.path}: {error.strerror or error}; choose another with --data"
            ) from None

    def credentials(self) -> Credentials:
        """The folder's credentials, made on first use.

        Raises:
            ConfigurationError: the file is there but cannot be understood.
        """
        path = self.path / "credentials.json"
        if (known := _read(path, Credentials)) is not None:
            return known
        fresh = Credentials(
            access_key=f"wa{secrets.token_hex(8)}",
            secret_key=secrets.token_hex(20),
            token=secrets.token_urlsafe(24),
            ray_token=secrets.token_hex(32),
        )
        _write(path, fresh)
        return fresh

    def write_identities(self) -> None:
        """Write whom the store knows, and what each of them may do."""
        known = self.credentials()
        admin = KeyPair(known.access_key, known.secret_key)
        _write_text(self.path / IDENTITIES, seaweed_config(admin=admin, bucket=BUCKET))

    def read_state(self) -> StackState | None:
        """The state of the stack that runs here, or that was killed here; None if there is none."""
        return _read(self.path / "stack.json", StackState)

    def write_state(self, state: StackState) -> None:
        """Replace the state; a reader sees the old one or the new one, whole."""
        _write(self.path / "stack.json", state)

    def clear_state(self) -> None:
        """Say that nothing runs here."""
        (self.path / "stack.json").unlink(missing_ok=True)

    def connection(self) -> Connection | None:
        """How to reach the stack that runs here, or None if none is ready."""
        state = self.read_state()
        if state is None or not state.is_ready or not self.is_locked():
            return None
        known = self.credentials()
        return Connection(
            api_url=state.api_url,
            token=known.token,
            s3_endpoint=state.s3_endpoint,
            bucket=state.bucket,
            access_key=known.access_key,
            secret_key=known.secret_key,
            pids=state.pids,
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one supervisor.

        Raises:
            ConflictError: another one holds it.
        """
        with (self.path / "lock").open("a") as file:
            deadline = time.monotonic() + _LOCK_PATIENCE_S  # `is_locked` holds it for an instant
            while not _try_lock(file.fileno(), fcntl.LOCK_EX):
                if time.monotonic() > deadline:
                    raise ConflictError(self._in_use())
                time.sleep(0.02)
            yield

    def is_locked(self) -> bool:
        """Whether a living supervisor holds the folder."""
        try:
            with (self.path / "lock").open("r") as file:
                return not _try_lock(file.fileno(), fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def _in_use(self) -> str:
        state = self.read_state()
        who = f" (supervisor {state.supervisor_pid}, API {state.api_url})" if state else ""
        return (
            f"a stack already runs on {self.path}{who}; use that one, stop it with "
            f"`wa down --data {self.path}`, or choose another folder with --data"
        )


def _try_lock(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path, model: type[M]) -> M | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        detail = "its content is not what was written" if isinstance(error, ValidationError) else error.strerror
        raise ConfigurationError(f"{path} cannot be read: {detail}; restore it or move it away") from None


def _write(path: Path, record: BaseModel) -> None:
    _write_text(path, record.model_dump_json(indent=2))


def _write_text(path: Path, text: str) -> None:
    draft = path.with_suffix(".draft")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)
