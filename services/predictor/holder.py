"""The process that holds models: loads published weights into a recipe's model, and asks it.

It runs user code (a recipe), so it is a process of its own: without credentials, killable, the first to go when
memory runs out. It reads a command a line on stdin and answers each with a line (`services.predictor.protocol`);
it ends when stdin does. A request that is wrong, or that the recipe fails on, spoils no other of its batch.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError

from services.predictor.protocol import (
    MESSAGE_LIMIT,
    AskModel,
    DropModel,
    LoadModel,
    Outcome,
    Reply,
    command_adapter,
)
from services.recipes.loader import load_recipe
from services.runtime.confined import take_stdout, yield_to_others
from services.runtime.prediction import Fault, Refusal
from wa_core.recipe import Recipe
from wa_core.tensors import map_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from services.predictor.protocol import Command

NICENESS = 5
_MAX_FAULTS = 20
_ADVICE = "give it an Instance, what one is asked, and predict(); the guide docs/guides/predict.md shows how"

Load = Callable[..., Recipe]


def main(load: Load = load_recipe) -> int:
    """Serve until stdin ends; `load` finds a recipe."""
    yield_to_others(niceness=NICENESS)
    answers = take_stdout()
    models = HeldModels(load)
    for line in sys.stdin:
        reply = models.do(command_adapter.validate_json(line))
        answers.write(reply.model_dump_json() + "\n")
        answers.flush()
    return 0


@dataclass(frozen=True, slots=True)
class _Held:
    recipe: Recipe
    model: nn.Module
    instances: TypeAdapter[Any]


class HeldModels:
    """The models of this process, by key."""

    def __init__(self, load: Load = load_recipe) -> None:
        self._load = load
        self._held: dict[str, _Held] = {}

    def do(self, command: Command) -> Reply:
        """Carry out a command; whatever user code raises is a reply."""
        match command:
            case LoadModel():
                return self._load_model(command)
            case AskModel():
                return Reply(outcomes=self._ask(self._held[command.key], command.requests))
            case DropModel():
                self._held.pop(command.key, None)
                return Reply()

    def _load_model(self, wanted: LoadModel) -> Reply:
        try:
            code = Path(wanted.code) if wanted.code else None
            recipe = self._load(wanted.recipe, wanted.config, seed=wanted.seed, code=code)
            if recipe.Instance is None:
                message = f"the recipe {wanted.recipe} declares nothing to predict: {_ADVICE}"
                return Reply(refusal=Refusal(code="prediction_not_supported", message=message))
            model = recipe.build_model()
            model.load_state_dict(map_checkpoint(Path(wanted.path)), strict=True)
            self._held[wanted.key] = _Held(recipe, model.eval(), TypeAdapter(recipe.Instance))
        except Exception as error:  # noqa: BLE001  user code may raise anything; the parent passes it on
            return Reply(refusal=_failed(error))
        return Reply()

    def _ask(self, held: _Held, requests: list[list[Any]]) -> list[Outcome]:
        checked = [_checked(held, instances) for instances in requests]
        good = [found for found in checked if not isinstance(found, Outcome)]
        answered = iter(_predict(held, good))
        return [found if isinstance(found, Outcome) else next(answered) for found in checked]


def _checked(held: _Held, instances: list[Any]) -> list[Any] | Outcome:
    """The instances as the recipe takes them, or what is wrong with them."""
    found, faults = [], []
    for number, instance in enumerate(instances):
        try:
            found.append(held.instances.validate_json(json.dumps(instance)))
        except ValidationError as error:
            faults += [
                Fault(pointer=_pointer(number, details["loc"]), message=details["msg"])
                for details in error.errors(include_url=False, include_input=False, include_context=False)
            ]
    if not faults:
        return found
    said = "; ".join(f"{fault.pointer}: {fault.message}" for fault in faults[:5])
    refusal = Refusal(code="invalid_instances", message=said[:MESSAGE_LIMIT], faults=faults[:_MAX_FAULTS])
    return Outcome(refusal=refusal)


def _predict(held: _Held, requests: list[list[Any]]) -> list[Outcome]:
    """One call for all; where that fails, one for each, so that only those fail that must."""
    together = [instance for instances in requests for instance in instances]
    if not together:
        return []
    try:
        with torch.inference_mode():
            predictions = held.recipe.predict(held.model, together)
        if len(predictions) != len(together):
            raise ValueError(f"predict() gave {len(predictions)} predictions for {len(together)} instances")  # noqa: TRY301
        predictions = json.loads(json.dumps(predictions, allow_nan=False))
    except Exception as error:  # noqa: BLE001  user code may raise anything; the parent passes it on
        if len(requests) == 1:
            return [Outcome(refusal=_failed(error))]
        return [outcome for request in requests for outcome in _predict(held, [request])]
    left = iter(predictions)
    return [Outcome(predictions=[next(left) for _ in instances]) for instances in requests]


def _pointer(number: int, location: tuple[int | str, ...]) -> str:
    parts = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return f"instances[{number}]{parts}"


def _failed(error: Exception) -> Refusal:
    traceback.print_exception(error)  # for whoever wrote the recipe
    message = f"the recipe failed: {type(error).__name__}: {error}"
    return Refusal(code="prediction_failed", message=message[:MESSAGE_LIMIT])


if __name__ == "__main__":
    sys.exit(main())
