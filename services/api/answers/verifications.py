"""Turns what the bucket says of a verification into the API's resource."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.api.schemas import Reason, VerificationResource

if TYPE_CHECKING:
    from wa_core.catalog.jobs import Job
    from wa_core.records import VerificationRecord, VerificationResult


def verification_resource(found: Job[VerificationRecord, VerificationResult]) -> VerificationResource:
    """A verification as the API shows it."""
    record, result = found.record, found.result
    code = result.code if result else None
    return VerificationResource(
        verification_id=record.verification_id,
        generation=record.generation,
        state=found.state,
        progress=found.done,
        is_equal=result.is_equal if result else None,
        reason=Reason(code=code, message=result.message) if result and code else None,
        num_checkpoints=result.num_checkpoints if result else 0,
        is_state_equal=result.is_state_equal if result else None,
        is_served_equal=result.is_served_equal if result else None,
        num_recalibrated=result.num_recalibrated if result else 0,
        created_at=record.created_at,
        finished_at=result.at if result else None,
        took_s=result.took_s if result else None,
    )
