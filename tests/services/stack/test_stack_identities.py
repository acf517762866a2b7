"""Each kind of process has an S3 identity, which opens its own part of the bucket: asked of a real SeaweedFS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.stack import seaweedfs
from services.stack.identities import GRANTS, KeyPair, iam_policy, key_pair, seaweed_config
from services.stack.seaweedfs import SeaweedConfig
from support.seaweed import Seaweed
from wa_core.errors import StoreAuthError
from wa_core.store.probe import probe_store
from wa_core.store.s3 import S3Store

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[3]
ADMIN = KeyPair("admin-key", "admin-secret")
RUN = "runs/01JZ8W6J5N1V3C9T7Q2R4S6X8Y"
CHECKPOINT = f"{RUN}/checkpoints/0001-000000000020-0123456789abcdef/model.safetensors"
AVERAGE = f"{RUN}/averages/swa/00000001.json"
LOG = f"{RUN}/log/0000000009.json"
PACKAGE = f"packages/{'0' * 64}.zip"
TOKEN = "tokens/0123456789abcdef.json"
OBJECTS = [CHECKPOINT, AVERAGE, LOG, PACKAGE, TOKEN, f"{RUN}/run.json", f"{RUN}/averages/log/00000001.json"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedConfig]:
    """A server that knows every kind of process, with some objects in its bucket."""
    folder = tmp_path_factory.mktemp("identities")
    identities = folder / "s3.json"
    identities.write_text(seaweed_config(admin=ADMIN, bucket="weights"))
    config = SeaweedConfig(
        data_dir=folder / "data",
        ports=seaweedfs.free_ports(seaweedfs.NUM_PORTS),
        access_key=ADMIN.access_key,
        secret_key=ADMIN.secret_key,
        identities=identities,
    )
    found = Seaweed(config)
    try:
        found.start()
        for key in OBJECTS:
            seaweedfs.open_store(config).put(key, b"as it was")
        yield config
    finally:
        found.kill()
        seaweedfs.remove_sockets(config)


def store_of(server: SeaweedConfig, role: str) -> S3Store:
    """The bucket as a kind of process sees it."""
    keys = key_pair(role, admin=ADMIN)
    return S3Store(
        bucket=server.bucket,
        endpoint_url=server.endpoint_url,
        access_key=keys.access_key,
        secret_key=keys.secret_key,
    )


@pytest.mark.parametrize(
    ("role", "key"),
    [
        ("api", CHECKPOINT),
        ("api", AVERAGE),
        ("trainer", AVERAGE),
        ("trainer", PACKAGE),
        ("trainer", TOKEN),
        ("trainer", f"{RUN}/run.json"),
        ("trainer", f"{RUN}/averages/log/00000001.json"),
        ("averager", PACKAGE),
        ("averager", TOKEN),
        ("averager", f"{RUN}/run.json"),
        ("notifier", LOG),
        ("notifier", CHECKPOINT),
        ("predictor", AVERAGE),
        ("predictor", LOG),
    ],
)
def test_what_another_process_writes_cannot_be_changed(server: SeaweedConfig, role: str, key: str) -> None:
    """The API deletes no checkpoint, a trainer writes no average, nobody but the API makes tokens, and so on."""
    store = store_of(server, role)

    for change in (lambda: store.put(key, b"x"), lambda: store.create(f"{key}x", b"x"), lambda: store.delete(key)):
        with pytest.raises(StoreAuthError):
            change()

    assert seaweedfs.open_store(server).get(key) == b"as it was"


@pytest.mark.parametrize("role", sorted(set(GRANTS) - {"api"}))
def test_tokens_are_the_apis_alone(server: SeaweedConfig, role: str) -> None:
    """Not even the digest of a token is read by processes that know no callers."""
    with pytest.raises(StoreAuthError):
        store_of(server, role).get(TOKEN)


@pytest.mark.parametrize("role", sorted(set(GRANTS) - {"predictor"}))
def test_each_process_can_prove_the_store(server: SeaweedConfig, role: str) -> None:
    """Its identity lets a process find out, when it starts, whether the store keeps its promises."""
    assert all(check.name for check in probe_store(store_of(server, role)).checks)


@pytest.mark.parametrize(
    ("role", "key"),
    [("api", LOG), ("api", TOKEN), ("trainer", CHECKPOINT), ("trainer", LOG), ("averager", AVERAGE)],
)
def test_each_process_writes_its_own(server: SeaweedConfig, role: str, key: str) -> None:
    """What a process is there for, it may do."""
    store = store_of(server, role)

    store.create(f"{key}.{role}", b"mine")

    assert store.get(f"{key}.{role}") == b"mine"
    assert f"{key}.{role}" in [info.key for info in store.list("" if role == "api" else "runs/")]


def test_an_averager_lets_go_of_checkpoints(server: SeaweedConfig) -> None:
    """Retention is the averager's: it deletes what it cannot replace by its own writing on AWS."""
    store = store_of(server, "averager")
    seaweedfs.open_store(server).put(f"{CHECKPOINT}.old", b"x")

    store.delete(f"{CHECKPOINT}.old")

    writes = next(one for one in iam_policy("averager", bucket="b")["Statement"] if one["Sid"] == "Write")
    assert not any("checkpoints" in resource for resource in writes["Resource"])


def test_one_identity_does_not_lead_to_another() -> None:
    """Nobody works out the administrator's secret, or another process's, from its own."""
    pairs = {key_pair(role, admin=ADMIN) for role in GRANTS} | {ADMIN}

    assert len({pair.secret_key for pair in pairs}) == len(pairs) == len(GRANTS) + 1
    assert not any(ADMIN.secret_key in pair.secret_key for pair in pairs - {ADMIN})
    assert ADMIN.secret_key not in repr(ADMIN)


@pytest.mark.parametrize("role", sorted(GRANTS))
def test_the_policies_in_deploy_say_the_same(role: str) -> None:
    """`deploy/bucket/policies` is what the embedded stack does, spelled for AWS; BUCKET stands for the bucket."""
    kept = (ROOT / "deploy" / "bucket" / "policies" / f"{role}.json").read_text()

    assert json.loads(kept) == iam_policy(role, bucket="BUCKET")
