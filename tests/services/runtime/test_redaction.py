from __future__ import annotations

import subprocess
import sys

import pytest

from services.runtime.redaction import REDACTED, redacting, secrets_in
from services.runtime.settings import Settings

SECRET = 's3cret/with+"quotes" and é'


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Authorization: Bearer abc.def-123", f"Authorization: Bearer {REDACTED}"),
        ("{'authorization': 'basic dXNlcjpwYXNz'}", f"{{'authorization': 'basic {REDACTED}'}}"),
        (f"token wa_{'0' * 16}_{'a' * 64}!", f"token wa_{'0' * 16}_{REDACTED}!"),
        ("Cookie: a=b; wa_session=d2Vpcmk; c=d", f"Cookie: a=b; wa_session={REDACTED}; c=d"),
        (
            "http://s3/b/k?X-Amz-Credential=key%2Fx&X-Amz-Date=1&X-Amz-Signature=abc",
            f"http://s3/b/k?X-Amz-Credential={REDACTED}&X-Amz-Date=1&X-Amz-Signature={REDACTED}",
        ),
        ("http://s3/b/k?Expires=1&Signature=a%3D", f"http://s3/b/k?Expires=1&Signature={REDACTED}"),
        ("https://me:hunter2@proxy:80/x", f"https://me:{REDACTED}@proxy:80/x"),
        ("run 01JZ8W6J5N1V3C9T7Q2R4S6X8Y: 3 tokens at http://127.0.0.1:80/v1", None),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(line: str, kept: str | None) -> None:
    """Whatever puts it there, no line has a token, a password, a session or a signature; the rest stays."""
    assert redacting()(None, "info", line) == (kept or line)


def test_own_secrets_are_taken_out_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's own secrets are known, and so is how JSON spells them."""
    monkeypatch.setenv("WA_TOKEN", SECRET)
    monkeypatch.setenv("WA_S3_SECRET_KEY", "s3-secret-key")
    monkeypatch.setenv("WA_TOKENS", '{"alice": "alices-own"}')
    found = set(secrets_in(Settings()))

    line = redacting(found)(None, "info", f"x{SECRET}y s3-secret-key z alices-own")

    assert found == {SECRET, "s3-secret-key", "alices-own"}
    assert line == f"x{REDACTED}y {REDACTED} z {REDACTED}"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_line_of_a_process_holds_a_secret(log_format: str) -> None:
    """Events, tracebacks and what libraries warn of: all of it passes the same gate."""
    code = f"""
import logging, structlog
from services.runtime.telemetry import configure_logging
secret = {SECRET!r}
configure_logging("test", log_format={log_format!r}, secrets=[secret])
try:
    raise RuntimeError(f"boom {{secret}}")
except RuntimeError:
    structlog.get_logger().exception("event", header=f"Bearer {{secret}}", nested={{"key": [secret]}})
    logging.getLogger("library").warning("said %s", secret)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert "boom" in done.stderr
    assert "said" in done.stderr
    assert "quotes" not in done.stderr
