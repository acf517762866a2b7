"""The processes of the service, started with an environment that cannot work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NO_STORE = ({"WA_STORE_URL": "nowhere"}, "write s3://bucket or file:///folder")


@pytest.mark.parametrize(
    ("service", "variables", "said"),
    [
        ("services.averager", *NO_STORE),
        ("services.trainer", *NO_STORE),
        ("services.api", *NO_STORE),
        ("services.api", {"WA_STORE_URL": "file://relative/folder"}, "file:///folder"),
        ("services.api", {"WA_POLL_INTERVAL_S": "never"}, "WA_POLL_INTERVAL_S: "),
        ("services.api", {"WA_API_PORT": "99999"}, "WA_API_PORT: "),
        ("services.api", {"WA_TOKENS": "hushhush"}, '"tokens"'),
        ("services.api", {"WA_TOKENS": '{"alice": ["hushhush"]}'}, "WA_TOKENS: "),
    ],
)
def test_a_process_that_cannot_start_says_why(service: str, variables: dict[str, str], said: str) -> None:
    """It ends with status 1 and a message, without a traceback and without what may be a secret."""
    ended = subprocess.run(
        [sys.executable, "-m", service],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hushhush" not in ended.stderr + ended.stdout
