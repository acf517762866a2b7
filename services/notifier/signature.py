"""Signs messages as the Standard Webhooks specification says, so that any of its libraries verifies them.

Source: https://www.standardwebhooks.com, version 1: HMAC-SHA256 over ``id.timestamp.body``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from wa_core.errors import ConfigurationError

PREFIX = "whsec_"
MIN_BYTES, MAX_BYTES = 24, 64


def parse_secret(text: str) -> bytes:
    """The key in a secret such as ``whsec_…``.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not MIN_BYTES <= len(key) <= MAX_BYTES:
        raise ConfigurationError(
            f"WA_WEBHOOK_SECRET must be base64 of {MIN_BYTES} to {MAX_BYTES} random bytes, with or without "
            f"{PREFIX!r} before it; make one with: echo {PREFIX}$(head -c 32 /dev/urandom | base64)"
        )
    return key


def headers_of(key: bytes, *, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a message; `timestamp` is in seconds since 1970."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }
