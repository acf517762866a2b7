"""Every record the processes exchange through the bucket. Units are in the field names; times are aware UTC.

Records are immutable. Those that are committed create-once carry a random `write_id`, by which a writer
recognises its own write when the response was lost (ADR 0003).
"""

from __future__ import annotations

from wa_core.records.base import (
    FORMAT,
    HEADLINE_METRIC,
    MAX_AVERAGES,
    AveragingState,
    Name,
    Record,
    Request,
    RunState,
    Sha256,
    new_write_id,
)
from wa_core.records.entries import (
    AttemptFailed,
    AttemptStarted,
    AverageAdded,
    Cancelled,
    CancelRequested,
    CheckpointCommitted,
    Entry,
    Failed,
    FileRef,
    LogEntry,
    Paused,
    PauseRequested,
    ResumeRequested,
    Submitted,
    Succeeded,
    TrainingFinished,
    entry_adapter,
)
from wa_core.records.manifests import (
    Assessment,
    AssessmentRecord,
    AverageManifest,
    BatchNormSummary,
    Comparison,
    Evaluation,
    Rebuilt,
    RebuiltPart,
    SetAside,
)
from wa_core.records.signs import Heartbeat, Marker
from wa_core.records.submission import AverageRequest, CheckpointPolicy, RecipeConfig, RunRequest, RunSpec, Scaling

__all__ = [
    "FORMAT",
    "HEADLINE_METRIC",
    "MAX_AVERAGES",
    "Assessment",
    "AssessmentRecord",
    "AttemptFailed",
    "AttemptStarted",
    "AverageAdded",
    "AverageManifest",
    "AverageRequest",
    "AveragingState",
    "BatchNormSummary",
    "CancelRequested",
    "Cancelled",
    "CheckpointCommitted",
    "CheckpointPolicy",
    "Comparison",
    "Entry",
    "Evaluation",
    "Failed",
    "FileRef",
    "Heartbeat",
    "LogEntry",
    "Marker",
    "Name",
    "PauseRequested",
    "Paused",
    "Rebuilt",
    "RebuiltPart",
    "RecipeConfig",
    "Record",
    "Request",
    "ResumeRequested",
    "RunRequest",
    "RunSpec",
    "RunState",
    "Scaling",
    "SetAside",
    "Sha256",
    "Submitted",
    "Succeeded",
    "TrainingFinished",
    "entry_adapter",
    "new_write_id",
]
