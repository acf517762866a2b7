"""The embedded stack from start to end: everything on this machine, under one supervisor.

Composes the data folder, the plan of children and the supervisor. The invariant: however `run_stack` ends,
short of SIGKILL, no process of the stack is left; after a SIGKILL the next start or stop on the folder finds
what was left.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx2
import structlog

from services.stack import ray_head, seaweedfs
from services.stack.leftovers import ProcessRef, kill_all, members
from services.stack.processes import STOP_ORDER, StackPlan, plan_children
from services.stack.state import BUCKET, IDENTITIES, Connection, DataFolder, StackState
from services.stack.supervisor import Supervisor
from wa_core.errors import ConfigurationError, StoreUnavailableError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType

    from services.stack.processes import ChildSpec
    from services.stack.seaweedfs import SeaweedConfig
    from services.stack.state import Credentials

log = structlog.get_logger(__name__)

START_TIMEOUT_S = 120.0
MAX_EARLY_DEATHS = 4
_POLL_S = 0.1
_TAIL_LINES = 5
_OK = 200
_SCRATCH_PREFIX = "wa-stack-"


class StoppedEarlyError(WeightAveragingError):
    """The stack was asked to end before it was ready."""

    kind = "stopped_early"


class StopSignals:
    """What SIGINT, SIGTERM and SIGHUP ask for: the first one an orderly end, the second one an instant end."""

    def __init__(self) -> None:
        self.is_set = False
        self.is_hurried = False

    def install(self) -> StopSignals:
        """Take over the three signals. Neither a first nor a second one may leave processes behind."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.is_hurried = self.is_set
        self.is_set = True


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What a user may choose. A port that is None is chosen among the free ones."""

    data: Path
    api_port: int | None = None


def run_stack(
    options: StackOptions,
    *,
    stop: StopSignals,
    environment: Mapping[str, str],
    on_ready: Callable[[Connection], None],
    is_abandoned: Callable[[], bool] = lambda: False,
) -> None:
    """Start the stack, call `on_ready`, keep it running until `stop`, and take it down.

    Args:
        options: where and on which ports.
        stop: asks for the end.
        environment: what the children inherit.
        on_ready: told once how to reach the stack.
        is_abandoned: asks for the end too, when it turns true.

    Raises:
        ConflictError: a stack already runs on this data folder.
        ConfigurationError: a part cannot be started; the message names its log.
        StoppedEarlyError: `stop` was set before everything was ready.
    """
    folder = DataFolder(options.data.resolve())
    folder.prepare()
    with folder.lock():
        sweep(folder)
        with _Stack(folder, options, environment=environment, stop=stop) as stack:
            on_ready(stack.start())
            while not stop.is_set and not is_abandoned():
                stack.supervisor.watch()
                time.sleep(_POLL_S)


def sweep(folder: DataFolder) -> list[int]:
    """Kill what a stack whose supervisor was killed left behind; returns the ids killed. Needs the lock."""
    state = folder.read_state()
    if state is None:
        return []
    killed = kill_all(lambda: members(state.stack_id, state.processes.values()))
    if state.store_ports:
        store = _store_config(folder.store, state.store_ports, folder.credentials())
        _remove_traces(Path(state.scratch_dir), store)
    folder.clear_state()
    if killed:
        log.info("leftovers_killed", data=str(folder.path), pids=killed)
    return killed


class _Stack:
    """One start of the stack; a context manager whose end leaves no process."""

    def __init__(
        self, folder: DataFolder, options: StackOptions, *, environment: Mapping[str, str], stop: StopSignals
    ) -> None:
        self._folder = folder
        self._stop = stop
        self._is_ready = False
        self._plan = _plan(folder, options)
        self._children = plan_children(self._plan, inherited=environment)
        self.supervisor = Supervisor(logs=folder.logs, on_change=self._record)
        self._record({})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as steps:  # the last pushed runs first, and each runs whatever the others do
            steps.callback(self._folder.clear_state)
            steps.callback(_remove_traces, self._plan.temp_dir.parent, self._plan.store)
            references = dict(self.supervisor.references)
            steps.callback(kill_all, lambda: members(self._plan.stack_id, references.values()))
            self.supervisor.stop(STOP_ORDER, is_hurried=lambda: self._stop.is_hurried)

    def start(self) -> Connection:
        """The store first, then everything else at once; returns when all of it answers."""
        self._start_child("store")
        self._wait_for_store()
        for name in self._children:
            if name != "store":
                self._start_child(name)
        self._wait_until_ready()
        self._is_ready = True
        self._record(self.supervisor.references)
        connection = self._folder.connection()
        assert connection is not None  # noqa: S101  just recorded as ready, under our own lock
        return connection

    def _start_child(self, name: str) -> None:
        spec: ChildSpec = self._children[name]
        try:
            self.supervisor.start(spec)
        except OSError as error:
            raise ConfigurationError(
                f"{name} cannot be started: {spec.argv[0]}: {error.strerror or error}; install "
                "weight-averaging[all]"
            ) from None

    def _wait_for_store(self) -> None:
        """Return once the store holds its bucket."""
        is_alive = lambda: self.supervisor.is_alive("store") and not self._stop.is_set  # noqa: E731
        try:
            seaweedfs.wait_until_ready(self._plan.store, timeout_s=START_TIMEOUT_S, is_alive=is_alive)
        except StoreUnavailableError as error:
            self._raise_if_stopped()
            raise ConfigurationError(f"{error.message}. {self._last_words('store')}") from None

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        with httpx2.Client(trust_env=False, timeout=10.0) as http:
            while missing := self._missing(http):
                self._raise_if_stopped()
                self.supervisor.watch()
                for name in self._children:
                    if self.supervisor.failures(name) >= MAX_EARLY_DEATHS:
                        raise ConfigurationError(f"{name} dies as soon as it starts. {self._last_words(name)}")
                if time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"{missing} was not ready after {START_TIMEOUT_S:.0f} s. {self._last_words(missing)}"
                    )
                time.sleep(_POLL_S)

    def _missing(self, http: httpx2.Client) -> str | None:
        """The first part that is not up yet."""
        for name in self._children:
            if not self.supervisor.is_alive(name):
                return name
        if not ray_head.answers(self._plan.ray):
            return "ray"
        try:
            is_ready = http.get(f"{self._plan.api_url}/readyz").status_code == _OK
        except httpx2.TransportError:
            is_ready = False
        return None if is_ready else "api"

    def _last_words(self, name: str) -> str:
        path = self._folder.logs / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if path.exists() else []
        return "\n".join([f"The end of {path}:", *(f"  {line}" for line in lines)])

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set:
            raise StoppedEarlyError("stopped before the stack was ready; nothing was left running")

    def _record(self, references: dict[str, ProcessRef]) -> None:
        self._folder.write_state(
            StackState(
                stack_id=self._plan.stack_id,
                supervisor_pid=os.getpid(),
                api_url=self._plan.api_url,
                s3_endpoint=self._plan.store.endpoint_url,
                bucket=self._plan.store.bucket,
                store_ports=self._plan.store.ports,
                ray_address=self._plan.ray.address,
                scratch_dir=str(self._plan.temp_dir.parent),
                is_ready=self._is_ready,
                processes=references,
            )
        )


def _plan(folder: DataFolder, options: StackOptions) -> StackPlan:
    if options.api_port and _is_taken(options.api_port):
        raise ConfigurationError(f"port {options.api_port} is taken; choose another with --port, or none")
    known = folder.credentials()
    # All at once, so that none is handed out twice.
    ports = seaweedfs.free_ports(seaweedfs.NUM_PORTS + ray_head.NUM_PORTS + 2)
    (api_port, predictor_port), ports = ports[:2], ports[2:]
    ray_ports, store_ports = ports[: ray_head.NUM_PORTS], ports[ray_head.NUM_PORTS :]
    store = _store_config(folder.store, store_ports, known)
    folder.write_identities()
    # Always below /tmp: a unix socket's path must stay under 104 bytes, and Ray adds about 65.
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir="/tmp"))
    temp_dir = scratch / "tmp"
    temp_dir.mkdir()
    return StackPlan(
        stack_id=uuid.uuid4().hex,
        credentials=known,
        store=store,
        ray=ray_head.RayHeadConfig(temp_dir=scratch / "ray", ports=ray_ports, token=known.ray_token),
        api_port=options.api_port or api_port,
        predictor_port=predictor_port,
        predictor_token=secrets.token_urlsafe(24),
        temp_dir=temp_dir,
    )


def _store_config(data_dir: Path, ports: tuple[int, ...], known: Credentials) -> SeaweedConfig:
    return seaweedfs.SeaweedConfig(
        data_dir=data_dir,
        ports=ports,
        access_key=known.access_key,
        secret_key=known.secret_key,
        bucket=BUCKET,
        identities=data_dir.parent / IDENTITIES,
    )


def _remove_traces(scratch: Path, store: SeaweedConfig) -> None:
    """What a stack leaves outside its data folder."""
    if scratch.name.startswith(_SCRATCH_PREFIX):
        shutil.rmtree(scratch, ignore_errors=True)
    seaweedfs.remove_sockets(store)


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
