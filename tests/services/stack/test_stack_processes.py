"""The plan of children: everything on loopback, with credentials, free of foreign settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.runtime.settings import Settings
from services.stack.processes import STOP_ORDER, ChildSpec, StackPlan, plan_children, settings_of
from services.stack.ray_head import NUM_PORTS as NUM_RAY_PORTS
from services.stack.ray_head import RayHeadConfig
from services.stack.seaweedfs import NUM_PORTS, SeaweedConfig
from services.stack.state import Credentials

PLAN = StackPlan(
    stack_id="abc",
    credentials=Credentials(access_key="key", secret_key="secret", token="token", ray_token="raytoken"),
    store=SeaweedConfig(
        data_dir=Path("/data/store"),
        ports=tuple(range(20_000, 20_000 + NUM_PORTS)),
        access_key="key",
        secret_key="secret",
    ),
    ray=RayHeadConfig(
        temp_dir=Path("/tmp/wa-stack-x/ray"),  # noqa: S108  only a name
        ports=tuple(range(21_000, 21_000 + NUM_RAY_PORTS)),
        token="raytoken",
    ),
    api_port=22_000,
    predictor_port=22_100,
    predictor_token="predictor-token",
    temp_dir=Path("/tmp/wa-stack-x/tmp"),  # noqa: S108  only a name
)


@pytest.fixture
def children() -> dict[str, ChildSpec]:
    """The planned children, below an environment of some other installation."""
    foreign = {
        "WA_STORE_URL": "s3://theirs",
        "AWS_PROFILE": "prod",
        "RAY_ADDRESS": "theirs:6379",
        "WA_TOKENS": '{"alice": "a"}',
        "WA_WRITE_TOKEN": "write",
        "WA_WEBHOOK_SECRET": "whsec_theirs",
        "HOME": "/home/a",
    }
    return plan_children(PLAN, inherited=foreign)


def test_every_child_carries_the_marker(children: dict[str, ChildSpec]) -> None:
    """Whatever a child starts inherits the marker by which it is found again."""
    assert {child.environment["WA_STACK_ID"] for child in children.values()} == {"abc"}


def test_every_child_is_in_the_stop_order_once(children: dict[str, ChildSpec]) -> None:
    """No child is forgotten at the end, and the store goes last."""
    ordered = [name for names in STOP_ORDER for name in names]

    assert sorted(ordered) == sorted(children)
    assert ordered[-1] == "store"


def test_settings_of_another_installation_do_not_leak_in(children: dict[str, ChildSpec]) -> None:
    """A shell that points to a production store or cluster cannot redirect the embedded stack."""
    for child in children.values():
        assert child.environment.get("WA_STORE_URL") in {None, "s3://weights"}
        assert "AWS_PROFILE" not in child.environment
        assert "RAY_ADDRESS" not in child.environment
        assert child.environment["HOME"] == "/home/a"


def test_the_api_alone_knows_what_callers_send(children: dict[str, ChildSpec]) -> None:
    """Tokens for callers reach the API, and neither the other services nor Ray, whose workers run user code."""
    for name, child in children.items():
        is_api = name == "api"
        told = [variable in child.environment for variable in ("WA_TOKEN", "WA_TOKENS", "WA_WRITE_TOKEN")]
        assert told == [is_api] * 3


def test_a_notifier_is_there_for_whoever_gave_a_secret_and_ray_never_sees_it(
    children: dict[str, ChildSpec],
) -> None:
    """The secret that webhooks are signed with starts a notifier, and is known to it and to the API alone."""
    knowing = {name for name, child in children.items() if "WA_WEBHOOK_SECRET" in child.environment}

    assert knowing == {"notifier", "api"}
    assert "notifier" not in plan_children(PLAN, inherited={})


def test_the_predictor_and_the_api_alone_know_their_token(children: dict[str, ChildSpec]) -> None:
    """User code in Ray workers cannot show the predictor the API's token; both are told the same address."""
    know = {name for name, child in children.items() if "WA_PREDICTOR_TOKEN" in child.environment}
    assert know == {"api", "predictor"}
    assert children["api"].environment["WA_PREDICTOR_URL"] == "http://127.0.0.1:22100"
    assert children["predictor"].environment["WA_PREDICTOR_PORT"] == "22100"


def test_each_process_has_an_identity_of_its_own(children: dict[str, ChildSpec]) -> None:
    """Nobody but the store has the administrator's keys, and no two processes have the same; Ray has none."""
    found = {name: child.environment.get("WA_S3_SECRET_KEY") for name, child in children.items()}
    known = [secret for secret in found.values() if secret is not None]

    assert {name for name, secret in found.items() if secret is None} == {"store", "ray"}
    assert len(set(known)) == len(known)
    assert PLAN.credentials.secret_key not in known


def test_settings_are_what_our_processes_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables are those of `Settings`: none misspelt, none ignored."""
    for name, value in settings_of(PLAN).items():
        monkeypatch.setenv(name, value)

    settings = Settings()

    assert settings.model_fields_set == {name.removeprefix("WA_").lower() for name in settings_of(PLAN)}
    assert settings.s3_endpoint == "http://127.0.0.1:20000"
    assert settings.ray_address == "127.0.0.1:21000"


def test_ray_asks_for_a_token_and_stays_on_loopback(children: dict[str, ChildSpec]) -> None:
    """The head and every driver share one token; nothing listens for other machines."""
    for name in ("ray", "runner"):
        environment = children[name].environment
        assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", "raytoken")
        assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "--node-ip-address=127.0.0.1" in children["ray"].argv


def test_no_secret_is_on_a_command_line(children: dict[str, ChildSpec]) -> None:
    """Command lines can be read by every user of the machine."""
    for child in children.values():
        assert not any(secret in word for secret in ("secret", "raytoken") for word in child.argv)
