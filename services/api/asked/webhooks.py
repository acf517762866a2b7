"""Whether a submission's webhooks could ever be called, so that a typing error is an answer and not a silence.

What a host's name leads to is not looked up here: that is judged each time before it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from services.api.problems import HttpProblem
from services.runtime.addresses import is_private_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wa_core.records import Webhook


@dataclass(frozen=True, slots=True)
class WebhookPolicy:
    """`is_on` where a notifier tells webhooks; with `allow_private`, private addresses and plain http too."""

    is_on: bool = False
    allow_private: bool = False


def check_webhooks(webhooks: Sequence[Webhook], policy: WebhookPolicy) -> None:
    """Refuse addresses that would never be called.

    Raises:
        HttpProblem: 422 ``webhooks_off`` or ``invalid_webhook``.
    """
    if webhooks and not policy.is_on:
        detail = "webhooks: this service tells none; its operator must set WA_WEBHOOK_SECRET and start a notifier"
        raise HttpProblem(detail, status=422, code="webhooks_off", faults=[("webhooks", detail)])
    faults = [
        (f"webhooks[{number}].url", fault)
        for number, webhook in enumerate(webhooks)
        if (fault := _fault(webhook.url, policy))
    ]
    if faults:
        detail = "; ".join(f"{pointer}: {message}" for pointer, message in faults)
        raise HttpProblem(detail, status=422, code="invalid_webhook", faults=faults)


def _fault(url: str, policy: WebhookPolicy) -> str | None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "this is no address; write for example https://example.com/hooks/runs"
    if not host or port == 0:
        return "the address names no host; write for example https://example.com/hooks/runs"
    if policy.allow_private:
        return None
    if parts.scheme != "https":
        return "only https addresses are called"
    if is_private_host(host):
        return f"{host} is private, and private addresses are not called"
    return None
