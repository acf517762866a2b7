"""A process's whole log after a session that tries to get secrets into it."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx2

from support.ports import free_port
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

TOKEN = "the-full-token-0123456789"
READ_TOKEN = "the-read-token-0123456789"
S3_SECRET = "the-s3-secret-0123456789"


def wait_for(url: str, *, seconds: float = 60.0) -> None:
    """Return once something answers there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            httpx2.get(url, timeout=5)
        except httpx2.TransportError:
            assert time.monotonic() < deadline, "the API does not start"
            time.sleep(0.05)
        else:
            return


def hostile_session(url: str) -> list[str]:
    """Secrets in every place where a request has one; returns those that were sent or received."""
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    cookie = base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("=")
    with httpx2.Client(base_url=url, timeout=20) as client:
        made = client.post("/v1/tokens", json={"name": "ci", "scopes": ["runs:read"]}, headers=bearer).json()
        secret = made["secret"]
        for answer in (
            client.get("/v1/runs", headers={"Authorization": f"Bearer {secret}"}),
            client.get(f"/v1/runs?after={TOKEN}", headers=bearer),
            client.get(f"/v1/runs/{secret}", headers=bearer),
            client.get(f"/{TOKEN}?X-Amz-Signature={S3_SECRET}", headers=bearer),
            client.get("/v1/runs", headers={"Authorization": f"Basic {TOKEN}"}),
            client.get("/v1/runs", headers={"Cookie": f"wa_session={cookie}"}),
            client.post("/v1/runs", content=f'{{"recipe": "{TOKEN}", "{READ_TOKEN}": 1'.encode(), headers=bearer),
            client.post("/v1/runs", json={"recipe": TOKEN, "config": {"key": S3_SECRET}}, headers=bearer),
            client.post("/session", data={"token": TOKEN}),
            client.post("/session", data={"token": f"{TOKEN}x"}, headers={"Sec-Fetch-Site": "cross-site"}),
            client.get("/v1/runs", headers={"Authorization": f"Bearer {TOKEN}" * 500}),
            client.get("/livez", headers={"Host": f"{TOKEN}.example"}),
            client.delete(f"/v1/tokens/{made['token_id']}", headers=bearer),
            client.get("/v1/runs", headers={"Authorization": f"Bearer {secret}"}),
        ):
            assert answer.status_code < 500, answer.text
            assert "Traceback" not in answer.text
    return [TOKEN, READ_TOKEN, S3_SECRET, secret, secret.rpartition("_")[2], cookie]


def test_no_secret_is_in_the_log_of_a_process(tmp_path: Path) -> None:
    """After a hostile session the process's whole log has no token, cookie, key or signature, and no traceback."""
    LocalStore(tmp_path / "bucket")
    port, log = free_port(), tmp_path / "log"
    environment = os.environ | {
        "WA_STORE_URL": f"file://{tmp_path / 'bucket'}",
        "WA_API_PORT": str(port),
        "WA_TOKEN": TOKEN,
        "WA_READ_TOKEN": READ_TOKEN,
        "WA_S3_SECRET_KEY": S3_SECRET,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.api"], env=environment, stdout=output, stderr=output
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/livez")
        secrets = hostile_session(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        status = process.wait(30)

    said = log.read_text()
    assert status == 0
    assert said.count("\n") > 10
    assert "Traceback" not in said
    assert [secret for secret in secrets if secret in said] == []
