"""The landscape child process: the loss of a recipe's model at mixtures of weights, point by point.

It runs user code, so it is a process of its own, as the assess process is: without credentials, killable, the
first to go when memory runs out, and behind everything else on the processor. It reads one folder a line on stdin
and answers with findings on stdout (`services.averager.landscape_protocol`). The invariant: what is found depends
on the recipe and the weights alone.
"""

from __future__ import annotations

import json
import math
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from services.averager import geometry
from services.averager.landscape_protocol import (
    LandscapeFailed,
    LandscapeFound,
    LandscapeJobFile,
    PointDone,
    landscape_job_path,
    weights_path,
)
from services.averager.protocol import MESSAGE_LIMIT
from services.recipes.loader import load_recipe
from services.runtime.confined import take_stdout, yield_to_others
from wa_core.batchnorm import recalibrate
from wa_core.calibration import count_samples
from wa_core.errors import InvalidInputError, WeightAveragingError
from wa_core.records import HEADLINE_METRIC
from wa_core.tensors import map_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from services.averager.assess import Load
    from services.averager.geometry import Grid, Shares
    from services.averager.landscape_protocol import LandscapeFinding
    from wa_core.recipe import Recipe

    Pair = tuple[float | None, float | None]  # the held-out loss and that on training data

FAILED = "landscape_failed"
_NICENESS = 19  # it yields to everything
_NUM_WEIGHTS = {"line": 2, "plane": 3}


def main(load: Load = load_recipe) -> int:
    """Serve jobs until stdin ends; `load` finds the recipe that a job names."""
    yield_to_others(niceness=_NICENESS)
    torch.set_num_threads(1)
    answers = take_stdout()
    for given in sys.stdin:
        for finding in findings(Path(json.loads(given)), load):
            answers.write(finding.model_dump_json() + "\n")
            answers.flush()
    return 0


def findings(folder: Path, load: Load = load_recipe) -> Iterator[LandscapeFinding]:
    """Do the job in `folder`; whatever user code raises is a finding."""
    try:
        job = LandscapeJobFile.model_validate_json(landscape_job_path(folder).read_bytes())
        yield from _work(job, folder, load)
    except WeightAveragingError as error:
        yield LandscapeFailed(code=error.code, message=error.message[:MESSAGE_LIMIT])
    except Exception as error:  # noqa: BLE001  user code may raise anything; the parent records it
        traceback.print_exception(error)  # for whoever wrote the recipe
        yield LandscapeFailed(code=FAILED, message=f"{type(error).__name__}: {error}"[:MESSAGE_LIMIT])


def _work(job: LandscapeJobFile, folder: Path, load: Load) -> Iterator[LandscapeFinding]:
    recipe = load(job.recipe, job.config, seed=job.seed, code=Path(job.code) if job.code else None)
    weights = [map_checkpoint(weights_path(folder, number)) for number in range(_NUM_WEIGHTS[job.kind])]
    surface = Surface.of(recipe, weights, max_samples=job.max_samples)
    grid = geometry.line(job.points) if job.kind == "line" else surface.plane(job.points)
    wanted = [shares for row in grid.rows for shares in row]
    losses: list[Pair] = []
    for shares in wanted:
        losses.append(surface.losses(shares))
        yield PointDone(done=len(losses), of=len(wanted))
    if not any(loss is not None for pair in losses for loss in pair):
        raise InvalidInputError("the loss is finite at no point", code="not_finite")
    yield _found(surface, grid, losses)


def _found(surface: Surface, grid: Grid, losses: Sequence[Pair]) -> LandscapeFound:
    width = len(grid.x)
    heldout, train = ([pair[side] for pair in losses] for side in (0, 1))
    return LandscapeFound(
        x=list(grid.x),
        y=list(grid.y),
        heldout=[heldout[begin : begin + width] for begin in range(0, len(losses), width)],
        train=[train[begin : begin + width] for begin in range(0, len(losses), width)],
        places=list(grid.places),
        losses_there=surface.losses_of_weights(),
        is_recalibrated=surface.is_recalibrated,
        num_heldout=surface.heldout.num_samples,
        num_train=surface.train.num_samples,
    )


@dataclass(frozen=True, slots=True)
class Sample:
    """The first batches of some data; at least one, where there is any."""

    batches: list[Any]
    num_samples: int

    @classmethod
    def of(cls, batches: Iterable[Any], *, max_samples: int) -> Sample:
        """Batches until there are `max_samples` samples."""
        found, num_samples = [], 0
        for batch in batches:
            found.append(batch)
            num_samples += count_samples(batch)
            if num_samples >= max_samples or len(found) >= max_samples:
                break
        return cls(found, num_samples)


class Surface:
    """The losses of mixtures of weights, each with BatchNorm statistics of its own.

    Args:
        recipe: measures.
        model: takes the weights.
        weights: to mix; by name.
        heldout: what the first loss is on.
        train: what the second loss is on, and BatchNorm is recalibrated with.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        weights: Sequence[Mapping[str, Tensor]],
        *,
        heldout: Sample,
        train: Sample,
    ) -> None:
        self.heldout = heldout
        self.train = train
        self.is_recalibrated = False
        self._recipe = recipe
        self._model = model
        self._weights = weights

    @classmethod
    def of(cls, recipe: Recipe, weights: Sequence[Mapping[str, Tensor]], *, max_samples: int) -> Surface:
        """That of a recipe, measured on at most so many samples of each kind."""
        heldout, train = (
            Sample.of(batches, max_samples=max_samples)
            for batches in (recipe.heldout_batches(), recipe.calibration_batches())
        )
        return cls(recipe, recipe.build_model(), weights, heldout=heldout, train=train)

    def plane(self, num_points: int) -> Grid:
        """The plane through its three weights."""
        parameters = [name for name, _ in self._model.named_parameters()]
        return geometry.plane(self._weights, parameters, num_points)

    def losses_of_weights(self) -> list[float | None]:
        """The held-out loss at each of the given weights."""
        numbers = range(len(self._weights))
        return [self.losses(tuple(float(number == one) for number in numbers))[0] for one in numbers]

    def losses(self, shares: Shares) -> Pair:
        """Held-out and training loss of a mixture; None for what is not finite.

        Raises:
            EmptyCalibrationError: BatchNorm cannot be recalibrated, at no point.
        """
        self._model.load_state_dict({name: self._mixed(name, shares) for name in self._weights[0]}, strict=True)
        try:
            report = recalibrate(self._model, self.train.batches, forward=self._recipe.forward)
        except InvalidInputError:
            if not self.train.batches:
                raise
            return None, None  # weights that far out give activations that are not finite
        self.is_recalibrated = not report.skipped
        return self._loss(self.heldout), self._loss(self.train)

    def _loss(self, sample: Sample) -> float | None:
        found = (
            float(self._recipe.evaluate(self._model, sample.batches)[HEADLINE_METRIC]) if sample.batches else None
        )
        return found if found is not None and math.isfinite(found) else None

    def _mixed(self, name: str, shares: Shares) -> Tensor:
        """What floats is mixed in float64 and rounded once; whole numbers are those of the last weights."""
        last = self._weights[-1][name]
        if not last.is_floating_point():
            return last
        parts = (share * one[name].double() for share, one in zip(shares, self._weights, strict=True) if share)
        return sum(parts, torch.zeros(last.shape, dtype=torch.float64)).to(last.dtype)


if __name__ == "__main__":
    sys.exit(main())
