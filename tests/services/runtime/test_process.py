"""The processes of the service, started with an environment that cannot work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("service", ["services.averager", "services.trainer"])
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WA_STORE_URL": "nowhere"}, "write s3://bucket or file:///folder"),
        ({"WA_POLL_INTERVAL_S": "never"}, "poll_interval_s"),
    ],
)
def test_a_process_that_cannot_start_says_why(service: str, variables: dict[str, str], said: str) -> None:
    """It ends with status 1 and a message, without a traceback."""
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
