"""Who may write what in the bucket: one S3 identity for each kind of process, with the least that it needs.

A table, and its two spellings: SeaweedFS's identities for the embedded stack, and IAM policies for a bucket on AWS
or whatever speaks its language (`deploy/bucket/policies`). It knows no process. The invariant: what one kind alone
writes, no other kind can change.
"""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass, field
from typing import Any

_RUN = "runs/" + "?" * 26  # the run's id: with a star, an average named `log` would be a log
_JOBS = ("landscapes/*", "verifications/*")
_RECORDS = ("runs/*", "queue/*", "active/*", *_JOBS, "telling/*", "packages/*", "probe/*")
_PROBE = ("probe/*",)


@dataclass(frozen=True, slots=True)
class Grant:
    """What an identity may read, write and delete, as patterns of keys; on SeaweedFS, who writes may delete."""

    reads: tuple[str, ...] = _RECORDS
    writes: tuple[str, ...] = ()
    deletes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyPair:
    """By what a process is known to the store."""

    access_key: str
    secret_key: str = field(repr=False)


GRANTS = {
    "api": Grant(
        reads=(*_RECORDS, "idempotency/*", "tokens/*"),
        writes=(
            f"{_RUN}/run.json",
            f"{_RUN}/log/*",
            f"{_RUN}/hints/log.json",
            *(f"{_RUN}/averages/*/{jobs}" for jobs in _JOBS),
            "queue/*",
            "active/*",
            *_JOBS,
            "telling/*",
            "idempotency/*",
            "packages/*",
            "tokens/*",
            *_PROBE,
        ),
        deletes=("queue/*", *_PROBE),
    ),
    # With Ray's workers, and so the code that users send.
    "trainer": Grant(
        writes=(
            *(
                f"{_RUN}/{part}/*"
                for part in ("log", "checkpoints", "metrics", "tensorboard", "logs", "heartbeats")
            ),
            f"{_RUN}/hints/log.json",
            "queue/*",
            *_PROBE,
        ),
        deletes=("queue/*", *_PROBE),
    ),
    "averager": Grant(
        writes=(
            *(f"{_RUN}/{part}/*" for part in ("log", "averages", "heartbeats", "hints")),
            "active/*",
            *_JOBS,
            *_PROBE,
        ),
        deletes=(f"{_RUN}/checkpoints/*", f"{_RUN}/averages/*/blobs/*", "active/*", *_JOBS, *_PROBE),
    ),
    "notifier": Grant(
        writes=(f"{_RUN}/webhooks/*", f"{_RUN}/heartbeats/*", "telling/*", *_PROBE), deletes=("telling/*", *_PROBE)
    ),
    "predictor": Grant(reads=("runs/*", "packages/*")),
}


def key_pair(role: str, *, admin: KeyPair) -> KeyPair:
    """The identity of a kind of process, which follows from the administrator's and does not lead back to it."""
    secret = hmac.digest(admin.secret_key.encode(), f"weight-averaging {role}".encode(), "sha256").hex()
    return KeyPair(f"{admin.access_key}-{role}", secret[:40])


def seaweed_config(*, admin: KeyPair, bucket: str) -> str:
    """SeaweedFS's configuration: the administrator, and an identity for each kind of process."""
    identities = [_identity("admin", admin, ["Admin", "Read", "Write", "List", "Tagging"])]
    for role, grant in GRANTS.items():
        changes = dict.fromkeys((*grant.writes, *grant.deletes))
        actions = [f"List:{bucket}"]
        actions += [f"Read:{bucket}/{pattern}" for pattern in grant.reads]
        actions += [f"Write:{bucket}/{pattern}" for pattern in changes]
        identities.append(_identity(role, key_pair(role, admin=admin), actions))
    return json.dumps({"identities": identities}, indent=2)


def iam_policy(role: str, *, bucket: str) -> dict[str, Any]:
    """The same as a policy of AWS IAM, which tells writing from deleting."""
    grant, name = GRANTS[role], f"arn:aws:s3:::{bucket}"
    statements = [
        {"Sid": "List", "Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": [name]},
        _statement("Read", ["s3:GetObject"], grant.reads, name=name),
        _statement("Write", ["s3:PutObject", "s3:AbortMultipartUpload"], grant.writes, name=name),
        _statement("Delete", ["s3:DeleteObject"], grant.deletes, name=name),
    ]
    return {"Version": "2012-10-17", "Statement": [one for one in statements if one["Resource"]]}


def _identity(name: str, keys: KeyPair, actions: list[str]) -> dict[str, Any]:
    credentials = [{"accessKey": keys.access_key, "secretKey": keys.secret_key}]
    return {"name": name, "credentials": credentials, "actions": actions}


def _statement(sid: str, actions: list[str], patterns: tuple[str, ...], *, name: str) -> dict[str, Any]:
    resources = [f"{name}/{pattern}" for pattern in patterns]
    return {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resources}
