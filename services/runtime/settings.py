"""The environment, read once by each process's `__main__`.

Every variable starts with `WA_`. Secrets never print themselves.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  pydantic needs it at run time
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from wa_core.errors import ConfigurationError
from wa_core.records import Name  # noqa: TC001  the same


class Settings(BaseSettings):
    """How a process finds its bucket and its peers.

    `store_url` is ``s3://bucket`` or ``file:///folder``. `s3_public_endpoint` is the address that a user's
    machine can reach, when it differs from `s3_endpoint`; presigned URLs are made for it. Callers of the API
    send `token`; or `write_token`, which opens all but the sending of code; or `read_token` if they only read; or
    one of `tokens` (JSON: owner -> token), whose runs are that owner's; with none set the API is open.

    The API answers to loopback names, the one that it is bound to, and `allowed_hosts` (with commas between); with
    `api_host` 0.0.0.0 to every address as well. Each owner may send `rate_limit` requests (such as 600/minute; no
    limit when not set or empty) and `submit_limit` submissions to each replica, and have
    `max_queued_per_owner` runs waiting.

    `ray_nodes_patience_s` is how long an attempt waits for a cluster that is too small for it, since nodes may be
    on their way. A runner trains `max_concurrent_runs` at a time, and of each owner at most `max_runs_per_owner`.

    With `assess_on_ray` the averager measures on the cluster at `ray_address`, if a raylet of it runs beside it
    and processors are free; else, and by default, in one process.

    The averager works in `scratch_dir` (the system's temporary folder when not set); accumulators beyond
    `accumulator_memory_mb` MiB in all live in files there. One assessment may take `assess_time_limit_s`, and its
    process `assess_memory_mb` MiB; one landscape `landscape_time_limit_s` and `landscape_memory_mb`. With
    `averager_port` it answers `/livez`, `/readyz` and `/metrics` on that port of `averager_host`; a runner does
    the same with `runner_port` and `runner_host`, a notifier with `notifier_port` and `notifier_host`.

    With `tracing`, or an OTEL_EXPORTER_OTLP_ENDPOINT, spans are sent there; `tracing=0` keeps them here.

    Webhooks are told by a notifier, which signs with `webhook_secret`; the API takes none without it. Private
    addresses are called only if `webhook_allow_private`. Links in messages begin with `public_url`, the API's
    address as others reach it.

    The API asks the predictor at `predictor_url`, and both know `predictor_token`; without a URL there are no
    predictions. A process that holds models loads `predictor_models_mb` MiB of weights at a time, the last used
    ones, and is killed when it takes `predictor_memory_mb` MiB of memory, or `predictor_time_limit_s` for a batch.
    """

    model_config = SettingsConfigDict(env_prefix="WA_", extra="ignore", frozen=True)

    store_url: str = "s3://weights"
    s3_endpoint: str | None = None
    s3_public_endpoint: str | None = None
    s3_access_key: str | None = None
    s3_secret_key: SecretStr | None = None
    s3_region: str = "us-east-1"

    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8000, ge=0, le=65535)
    token: SecretStr | None = None
    write_token: SecretStr | None = None
    read_token: SecretStr | None = None
    tokens: dict[Name, SecretStr] = Field(default_factory=dict)
    allowed_hosts: str = ""
    rate_limit: str | None = None
    submit_limit: str | None = "6000/minute"
    max_queued_per_owner: int | None = Field(default=None, ge=1)

    ray_address: str | None = None
    ray_nodes_patience_s: float = Field(default=0.0, ge=0)
    max_concurrent_runs: int = Field(default=1, ge=1)
    max_runs_per_owner: int | None = Field(default=None, ge=1)
    runner_host: str = "127.0.0.1"
    runner_port: int | None = Field(default=None, ge=0, le=65535)
    scratch_dir: Path | None = None
    accumulator_memory_mb: int = Field(default=256, ge=0)
    assess_time_limit_s: float = Field(default=300.0, gt=0)
    assess_memory_mb: int = Field(default=4096, ge=1)
    assess_on_ray: bool = False
    landscape_time_limit_s: float = Field(default=900.0, gt=0)
    landscape_memory_mb: int = Field(default=4096, ge=1)
    averager_host: str = "127.0.0.1"
    averager_port: int | None = Field(default=None, ge=0, le=65535)

    public_url: str | None = None
    webhook_secret: SecretStr | None = None
    webhook_allow_private: bool = False
    notifier_host: str = "127.0.0.1"
    notifier_port: int | None = Field(default=None, ge=0, le=65535)

    predictor_url: str | None = None
    predictor_token: SecretStr | None = None
    predictor_host: str = "127.0.0.1"
    predictor_port: int = Field(default=8002, ge=0, le=65535)
    predictor_models_mb: int = Field(default=1024, ge=1)
    predictor_memory_mb: int = Field(default=4096, ge=1)
    predictor_time_limit_s: float = Field(default=30.0, gt=0)

    poll_interval_s: float = Field(default=0.25, gt=0)
    tracing: bool | None = None
    log_format: Literal["console", "json"] = "console"


def read_settings(**given: Any) -> Settings:  # noqa: ANN401  each field has its own type
    """What the environment says, but for what is given.

    Raises:
        ConfigurationError: a variable is wrong; the message names it, but not its value, which may be a secret.
    """
    try:
        return Settings(**given)
    except SettingsError as error:  # it names the field
        raise ConfigurationError(f"the environment is wrong: {error}; write it as JSON") from None
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        said = "; ".join(f"WA_{str(fault['loc'][0]).upper()}: {fault['msg']}" for fault in faults)
        raise ConfigurationError(f"the environment is wrong: {said}") from None
