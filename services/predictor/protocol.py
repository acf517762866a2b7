"""What the predictor and its holder processes say to each other: one JSON line a command, one a reply.

It knows records; no process, no torch. The invariant: what a holder says is parsed into these or not believed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter

from services.runtime.prediction import Refusal  # noqa: TC001  pydantic needs it at run time
from wa_core.records import Record

MESSAGE_LIMIT = 2000


class LoadModel(Record):
    """Build a model of a recipe, and load weights into it. `code` is the folder of its package, if any."""

    do: Literal["load"] = "load"
    key: str
    recipe: str
    code: str | None
    config: dict[str, JsonValue]
    seed: int
    path: str


class AskModel(Record):
    """Predict for several requests at once, with a model that is loaded."""

    do: Literal["ask"] = "ask"
    key: str
    requests: list[list[JsonValue]]


class DropModel(Record):
    """Forget a model."""

    do: Literal["drop"] = "drop"
    key: str


class Outcome(Record):
    """What came of one request: predictions, or why there are none."""

    predictions: list[JsonValue] = Field(default_factory=list)
    refusal: Refusal | None = None


class Reply(Record):
    """The answer to one command: an outcome for each request, or one refusal for all of it."""

    outcomes: list[Outcome] = Field(default_factory=list)
    refusal: Refusal | None = None


Command = Annotated[LoadModel | AskModel | DropModel, Field(discriminator="do")]
command_adapter: TypeAdapter[Command] = TypeAdapter(Command)
