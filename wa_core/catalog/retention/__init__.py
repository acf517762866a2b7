"""What of a run's objects is kept, what may go, and why (ADR 11). Pure: it judges, and deletes nothing."""

from wa_core.catalog.retention.picture import (
    AveragePicture,
    Delete,
    Generation,
    Grace,
    Keep,
    RunPicture,
    Served,
    Verdict,
)
from wa_core.catalog.retention.plan import plan

__all__ = [
    "AveragePicture",
    "Delete",
    "Generation",
    "Grace",
    "Keep",
    "RunPicture",
    "Served",
    "Verdict",
    "plan",
]
