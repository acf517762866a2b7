"""One attempt as a Ray Train job: the only file that imports ray.

Ray starts the workers and their process group, and says when one has died. It gets no weights, no retries and no
storage of ours: checkpoints and recovery belong to `wa_core.publisher` and `services.trainer.runner`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.trainer.admission import lack_of, needs_each
from services.trainer.failure import INSUFFICIENT_RESOURCES, RAY_UNAVAILABLE, WORKER_DIED
from services.trainer.trace import Trace
from wa_core.errors import (
    ConfigurationError,
    TransientError,
    UserCodeError,
    WeightAveragingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray.train.torch import TorchTrainer

    from services.runtime.settings import Settings
    from wa_core.records import Scaling

CONNECT_PATIENCE_S = 60.0
PROCESS_GROUP_TIMEOUT_S = 900
OBJECT_STORE_BYTES = 200 * 1024 * 1024

# A dictionary, because type checkers see the first version of Ray's FailureConfig, which lacks the second field.
_NO_RETRIES: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 3}

# Read by Ray when it is imported, and passed on by it to its controller and workers.
_RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """Which attempt of which run to train, and with how many workers: just `scaling.num_workers`."""

    run_id: str
    attempt: int
    scaling: Scaling


def run_job(job: TrainingJob, settings: Settings) -> None:
    """Train one attempt on Ray; returns when every worker has returned.

    Must be called in the main thread of a process of its own: SIGINT then aborts the job in good order.

    Raises:
        ConfigurationError: with code ``insufficient_resources``, the cluster is too small.
        TransientError: Ray cannot be reached (``ray_unavailable``) or a worker died (``worker_died``).
        UserCodeError: the recipe raised.
        WeightAveragingError: whatever a worker's training loop raised.
    """
    _prepare_environment(settings.ray_address)
    import ray

    _connect(settings.ray_address)
    try:
        _await_resources(job.scaling, patience_s=settings.ray_nodes_patience_s)
        with tempfile.TemporaryDirectory(prefix="wa-train-") as folder:
            _fit(job, settings, folder=folder)
    finally:
        ray.shutdown()


def fetch_totals(address: str) -> dict[str, float] | None:
    """What the living nodes of the cluster at `address` have together; None when it does not answer.

    It joins no cluster and starts nothing: one question to the cluster's control store.
    """
    os.environ.update(_RAY_ENVIRONMENT)
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=5).values()
    except Exception:  # noqa: BLE001  Ray's errors share no base; whatever it is, nothing is known
        return None
    totals: dict[str, float] = {}
    for node in nodes:
        if node.state == node.ALIVE:
            for name, amount in node.resources_total.items():
                totals[name] = totals.get(name, 0.0) + amount
    return totals


def _prepare_environment(address: str | None) -> None:
    """Set what Ray reads when it is imported; a cluster of our own gets a token that only its processes know."""
    os.environ.update(_RAY_ENVIRONMENT)
    if address is None:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _connect(address: str | None) -> None:
    """Join the cluster at `address`, or start a small one that ends with this process."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "configure_logging": True}
    if address is None:
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
        return
    deadline = time.monotonic() + CONNECT_PATIENCE_S
    while True:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise TransientError(
                    f"Ray at {address} could not be reached within {CONNECT_PATIENCE_S:.0f} s: {error}",
                    code=RAY_UNAVAILABLE,
                ) from error
            ray.shutdown()
            time.sleep(1.0)
        else:
            return


def _await_resources(scaling: Scaling, *, patience_s: float) -> None:
    """Return once the cluster is large enough; after its head has restarted, its nodes join one by one.

    Raises:
        ConfigurationError: with code ``insufficient_resources``, if it still is too small after `patience_s`.
    """
    import ray

    deadline = time.monotonic() + patience_s
    while True:
        try:
            _check_resources(scaling, ray.cluster_resources())  # type: ignore[no-untyped-call]  # Ray's
        except ConfigurationError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1.0)
        else:
            return


def _check_resources(scaling: Scaling, cluster: Mapping[str, float]) -> None:
    """Refuse what Ray would wait for without an end.

    Raises:
        ConfigurationError: with code ``insufficient_resources``.
    """
    if lack := lack_of(scaling, cluster, where="whole cluster has"):
        raise ConfigurationError(f"{lack}; ask for fewer workers, or add nodes", code=INSUFFICIENT_RESOURCES)


def _fit(job: TrainingJob, settings: Settings, *, folder: str) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    trainer = _trainer_class()(
        _train_function(job, settings, folder=folder),
        torch_config=TorchConfig(
            backend="nccl" if job.scaling.use_gpu else "gloo", timeout_s=PROCESS_GROUP_TIMEOUT_S
        ),
        scaling_config=ScalingConfig(
            num_workers=job.scaling.num_workers,
            use_gpu=job.scaling.use_gpu,
            placement_strategy="SPREAD",  # a lost node then costs as few workers as it can
            resources_per_worker=needs_each(job.scaling),
        ),
        run_config=RunConfig(
            name=f"{job.run_id}-{job.attempt}",
            storage_path=folder,
            failure_config=FailureConfig(**_NO_RETRIES),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _cause_of(error) from error


def _trainer_class() -> type[TorchTrainer]:
    """TorchTrainer without its detached actor for placement groups, which outlives every killed driver.

    We need no such actor: the controller and its placement group end with the driver that owns them. It would ask
    a dashboard that is not there whether the controller lives, and so run for ever, one for each killed driver.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # the second version's
            return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

    return Trainer


def _train_function(job: TrainingJob, settings: Settings, *, folder: str) -> Callable[[], None]:
    """What every worker runs. The settings travel inside it, so that no log or dashboard shows them.

    Workers on this machine leave their files in `folder`, which goes with the driver even if they are killed.
    """
    trace = Trace.of_this_process()

    def train_worker() -> None:
        import ray.train

        from services.runtime.stores import open_store
        from services.runtime.telemetry import configure_logging
        from services.trainer.context import TrainContext
        from services.trainer.loop import train

        ranks = ray.train.get_context()
        rank = ranks.get_world_rank()
        about = {"run_id": job.run_id, "attempt": job.attempt, "rank": rank}
        configure_logging("trainer", log_format=settings.log_format, **about)
        with trace.going_on(settings) if rank == 0 else contextlib.nullcontext():
            train(
                TrainContext(
                    open_store(settings),
                    job.run_id,
                    job.attempt,
                    rank=rank,
                    world_size=ranks.get_world_size(),
                    device="cuda" if job.scaling.use_gpu else "cpu",
                    node=ray.get_runtime_context().get_node_id(),
                    scratch_dir=Path(folder) if Path(folder).is_dir() else None,
                    traceparent=trace.traceparent,
                )
            )

    return train_worker


def _cause_of(error: Exception) -> WeightAveragingError:
    """The one reason behind a failed job; a dead worker comes before the errors that it caused in others."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in sorted(failures.items())}
    for rank, cause in causes.items():
        if not isinstance(cause, WeightAveragingError):
            return TransientError(f"worker {rank} died: {_first_line(cause)}", code=WORKER_DIED)
    known = [cause for cause in causes.values() if isinstance(cause, WeightAveragingError)]
    for kind in (UserCodeError, WeightAveragingError):
        for cause in known:
            if isinstance(cause, kind) and cause.code != "peer_lost":
                return cause
    return known[0] if known else TransientError(f"Ray Train failed: {_first_line(error)}", code="ray_failed")


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
