"""What the API and the predictor say to each other: whose answer is wanted to which instances, and the answer.

It knows records; no HTTP and no process. The API has picked the generation, so the two never differ about which is
meant: a request is answered by exactly one, whatever is published meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, JsonValue

from wa_core.errors import WeightAveragingError
from wa_core.records import Name, Record, Sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

#: In one request.
MAX_INSTANCES = 256

PREDICT_PATH = "/predict"
RETRY_AFTER_S = 1

#: The HTTP status of each refusal, by its code.
STATUSES = {
    "invalid_instances": 422,
    "prediction_not_supported": 501,
    "prediction_failed": 502,
    "prediction_timeout": 504,
    "model_too_large": 501,
    "predictor_busy": 503,
    "predictor_unavailable": 503,
    "storage_unavailable": 503,
}


class PredictionJob(Record):
    """What is asked, and of which published weights."""

    run_id: str
    average: Name
    generation: int = Field(ge=1)
    instances: list[JsonValue] = Field(min_length=1, max_length=MAX_INSTANCES)


class PredictionAnswer(Record):
    """One prediction for each instance, and what made them."""

    predictions: list[JsonValue]
    run_id: str
    average: Name
    generation: int
    sha256: Annotated[Sha256, Field(description="of the weights that answered")]


class Fault(Record):
    """One thing wrong with an instance: where, and what."""

    pointer: str
    message: str


class Refusal(Record):
    """Why there are no predictions."""

    code: str
    message: str
    faults: list[Fault] = Field(default_factory=list)


class PredictionRefusedError(WeightAveragingError):
    """There are no predictions; `code` is one of `STATUSES`."""

    kind = "prediction_refused"

    def __init__(self, message: str, *, code: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message, code=code)
        self.faults = list(faults)

    @property
    def status(self) -> int:
        """As HTTP."""
        return STATUSES.get(self.code, 502)

    @property
    def refusal(self) -> Refusal:
        """As a record."""
        return Refusal(code=self.code, message=self.message, faults=self.faults)
