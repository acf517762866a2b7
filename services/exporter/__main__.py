"""`python -m services.exporter`: one conversion, asked in a line of JSON on stdin and answered in one on stdout.

It runs user code (a recipe), so it is a process of its own, without credentials, that its parent can end.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Literal

from pydantic import JsonValue  # noqa: TC002  pydantic needs it at run time

from services.exporter.conversion import export_onnx, export_program
from services.recipes.loader import load_recipe
from services.runtime.confined import take_stdout, yield_to_others
from wa_core.errors import InvalidInputError, WeightAveragingError
from wa_core.records import Record
from wa_core.tensors import map_checkpoint

NICENESS = 5


class Conversion(Record):
    """What to convert, into what, and where to. `code` is the folder of the recipe's package, if any."""

    recipe: str
    code: str | None
    config: dict[str, JsonValue]
    seed: int
    weights: str
    format: Literal["pt2", "onnx"]
    output: str
    about: dict[str, str]


def main() -> int:
    """Do what stdin asks."""
    yield_to_others(niceness=NICENESS)
    answers = take_stdout()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(line)) + "\n")
        answers.flush()
    return 0


def _answer(line: str) -> dict[str, str]:
    try:
        convert(Conversion.model_validate_json(line))
    except WeightAveragingError as error:
        return {"code": error.code, "message": error.message}
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'weight-averaging[export,recipes]'"
        return {"code": "not_installed", "message": message}
    except Exception as error:  # noqa: BLE001  user code and exporters raise what they like; the parent shows it
        traceback.print_exception(error)
        return {
            "code": "export_failed",
            "message": f"the model cannot be exported: {type(error).__name__}: {error}",
        }
    return {}


def convert(wanted: Conversion) -> None:
    """Build the model, load the weights, write the program.

    Raises:
        InvalidInputError: the recipe has no example inputs (`export_not_supported`), or is none.
    """
    code = Path(wanted.code) if wanted.code else None
    recipe = load_recipe(wanted.recipe, wanted.config, seed=wanted.seed, code=code)
    inputs = recipe.example_inputs()
    if inputs is None:
        raise InvalidInputError(
            f"the recipe {wanted.recipe} cannot be exported: it has no example_inputs(); define it to return two "
            f"samples as model(*inputs) takes them, see docs/guides/formats.md",
            code="export_not_supported",
        )
    model = recipe.build_model()
    model.load_state_dict(map_checkpoint(Path(wanted.weights)), strict=True)
    if wanted.format == "pt2":
        export_program(model, inputs, Path(wanted.output), about=json.dumps(wanted.about))
    else:
        export_onnx(model, inputs, Path(wanted.output), about=wanted.about)


if __name__ == "__main__":
    sys.exit(main())
