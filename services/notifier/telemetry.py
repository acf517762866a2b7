"""What a notifier counts and times, for Prometheus. No run and no receiver is a label."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

TRIES = Counter("wa_notifier_tries", "Messages sent, or tried to: delivered, failed, given_up.", ["outcome"])
SEND_SECONDS = Histogram("wa_notifier_send_seconds", "One message from the look-up of its host to the answer.")
PENDING = Gauge("wa_notifier_pending_messages", "Messages that are due, or wait to be tried again.")
OLDEST_SECONDS = Gauge("wa_notifier_oldest_pending_seconds", "Age of the oldest event that was not delivered yet.")
