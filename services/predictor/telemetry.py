"""What the predictor tells Prometheus. No label names a run, and none is what a user wrote."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

PREDICTIONS = Counter("wa_predictor_predictions", "Instances that were predicted for.")
REFUSED = Counter("wa_predictor_refused", "Requests that got no predictions.", ["code"])
BATCH_INSTANCES = Histogram(
    "wa_predictor_batch_instances",
    "Instances that were put to a model together.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
BATCH_SECONDS = Histogram("wa_predictor_batch_seconds", "Seconds that one batch took, without loading its model.")
LOADED = Counter("wa_predictor_loaded", "Models that were loaded.")
