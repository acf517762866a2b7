"""The children of the embedded stack, as plain data: command line, environment, log name. Pure.

Knows no process that runs. The order of `STOP_ORDER` is what a clean shutdown follows: who writes first, what
they write to last.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.stack import ray_head, seaweedfs
from services.stack.identities import GRANTS, KeyPair, key_pair
from services.stack.leftovers import MARKER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from services.stack.ray_head import RayHeadConfig
    from services.stack.seaweedfs import SeaweedConfig
    from services.stack.state import Credentials

STOP_ORDER: tuple[tuple[str, ...], ...] = (
    ("runner", "averager", "notifier"),
    ("api",),
    ("predictor",),
    ("ray",),
    ("store",),
)
# Where the predictor is, and what the API shows it; how much it may take can be set from outside.
_BETWEEN = ("WA_PREDICTOR_URL", "WA_PREDICTOR_HOST", "WA_PREDICTOR_PORT", "WA_PREDICTOR_TOKEN")
_OURS = ("WA_STORE_URL", "WA_S3_", "WA_API_", "WA_TOKEN", "WA_RAY_", "AWS_", "RAY_", *_BETWEEN)
# What callers send instead of the stack's own token; nobody else needs to know, user code in Ray workers least.
_OTHER_TOKENS = ("WA_TOKENS", "WA_WRITE_TOKEN", "WA_READ_TOKEN")
_WEBHOOK_SECRET = "WA_WEBHOOK_SECRET"  # noqa: S105  the variable's name


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to keep running. `environment` is complete; `grace_s` is what it gets after SIGTERM."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    grace_s: float = 10.0


@dataclass(frozen=True, slots=True)
class StackPlan:
    """Everything that the children's command lines and environments follow from.

    `predictor_token` is between the API and the predictor, and new at every start. `temp_dir` is where children
    make temporary files, so that those of a killed one are found and removed.
    """

    stack_id: str
    credentials: Credentials
    store: SeaweedConfig
    ray: RayHeadConfig
    api_port: int
    predictor_port: int
    predictor_token: str
    temp_dir: Path

    @property
    def api_url(self) -> str:
        """Where the API listens."""
        return f"http://127.0.0.1:{self.api_port}"


def plan_children(plan: StackPlan, *, inherited: Mapping[str, str]) -> dict[str, ChildSpec]:
    """The children by name, the store first; a notifier is among them if there is a secret to sign with.

    Args:
        plan: ports, credentials and folders.
        inherited: the supervisor's environment. Settings of another installation (store, API, Ray, AWS) are
            taken out of it, so that they cannot leak into this one.
    """
    left_out = (*_OURS, *_OTHER_TOKENS, _WEBHOOK_SECRET)
    base = {name: value for name, value in inherited.items() if not name.startswith(left_out)}
    tokens = {name: inherited[name] for name in _OTHER_TOKENS if name in inherited}
    webhooks = {_WEBHOOK_SECRET: inherited[_WEBHOOK_SECRET]} if inherited.get(_WEBHOOK_SECRET) else {}
    base |= {MARKER: plan.stack_id, "TMPDIR": str(plan.temp_dir), "PYTHONUNBUFFERED": "1"}
    service = base | settings_of(plan)
    keys = {role: keys_of(plan, role) for role in GRANTS}
    callers = {"WA_TOKEN": plan.credentials.token}
    predictor = {
        "WA_PREDICTOR_URL": f"http://127.0.0.1:{plan.predictor_port}",
        "WA_PREDICTOR_HOST": "127.0.0.1",
        "WA_PREDICTOR_PORT": str(plan.predictor_port),
        "WA_PREDICTOR_TOKEN": plan.predictor_token,
    }
    ray = ray_head.environment(plan.ray)
    specs = [
        ChildSpec("store", tuple(seaweedfs.argv(plan.store)), base | seaweedfs.environment(plan.store)),
        ChildSpec("ray", (*_module("services.stack.ray_process"), *ray_head.argv(plan.ray)), base | ray),
        ChildSpec(
            "runner", _module("services.trainer"), service | keys["trainer"] | ray_head.environment(plan.ray)
        ),
        ChildSpec("averager", _module("services.averager"), service | keys["averager"]),
        ChildSpec("api", _module("services.api"), service | keys["api"] | callers | tokens | webhooks | predictor),
        ChildSpec("predictor", _module("services.predictor"), service | keys["predictor"] | predictor),
    ]
    if webhooks:
        specs.append(ChildSpec("notifier", _module("services.notifier"), service | keys["notifier"] | webhooks))
    return {spec.name: spec for spec in specs}


def settings_of(plan: StackPlan) -> dict[str, str]:
    """The WA_* variables by which our own processes find the bucket and each other."""
    return {
        "WA_STORE_URL": f"s3://{plan.store.bucket}",
        "WA_S3_ENDPOINT": plan.store.endpoint_url,
        "WA_API_HOST": "127.0.0.1",
        "WA_API_PORT": str(plan.api_port),
        "WA_RAY_ADDRESS": plan.ray.address,
    }


def keys_of(plan: StackPlan, role: str) -> dict[str, str]:
    """The WA_* variables by which the store knows one kind of process, and lets it do its work alone."""
    admin = KeyPair(plan.credentials.access_key, plan.credentials.secret_key)
    keys = key_pair(role, admin=admin)
    return {"WA_S3_ACCESS_KEY": keys.access_key, "WA_S3_SECRET_KEY": keys.secret_key}


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)
