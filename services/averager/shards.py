"""The parts that one assessment is cut into, each done with the recipe, the weights and a share of the data.

It runs user code and knows nothing of where it runs. The invariant: parts put together again give what one
process computes alone, bit for bit on the same kind of processor, as long as the recipe treats each batch by
itself: the moments of batches are merged, and the values of samples put in line, in the order of the batches,
whoever had them. (A layer that runs several times in one batch has its moments merged in another order: float64
rounding.)
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from services.averager.layers import measure_distances
from services.averager.measuring import (
    Measured,
    changed_buffers,
    data_digest,
    measure,
    measured_of,
    summary_of,
)
from services.recipes.loader import load_recipe
from wa_core.batchnorm import BatchNormReport, apply_moments, collect_moments, merge_moments
from wa_core.calibration import count_samples
from wa_core.packages import unpack
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from services.averager.protocol import JobFile
    from wa_core.moments import Moments
    from wa_core.recipe import Recipe
    from wa_core.records import BatchNormSummary, LayerDistance

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """Every `of`-th batch, from the one with this number on."""

    number: int
    of: int

    def take(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of this part."""
        return islice(batches, self.number, None, self.of)


@dataclass(frozen=True, slots=True)
class Setting:
    """What every part needs: the job, and the package that its recipe is in, if it is in one."""

    job: JobFile
    package: bytes | None


@dataclass(frozen=True, slots=True)
class Collected:
    """The moments of the inputs of each layer for one calibration batch."""

    moments: Mapping[str, Moments]
    num_samples: int


def in_line(parts: Sequence[Sequence[T]]) -> list[T]:
    """What parts found out of each of their batches, in the order of the batches."""
    return [part[turn] for turn in range(max(map(len, parts), default=0)) for part in parts if turn < len(part)]


def digest(setting: Setting) -> str:
    """The digest of all data."""
    with _recipe(setting) as recipe:
        return data_digest(recipe)


def collect(setting: Setting, weights: Any, part: Part) -> list[Collected]:  # noqa: ANN401  a buffer
    """The moments of a part of the calibration data."""
    with _loaded(setting, weights) as (recipe, model):
        return [
            Collected(collect_moments(model, [batch], forward=recipe.forward), count_samples(batch))
            for batch in part.take(recipe.calibration_batches())
        ]


def settle(
    setting: Setting,
    weights: Any,  # noqa: ANN401  a buffer
    collected: Sequence[Collected],
) -> tuple[BatchNormSummary, dict[str, Tensor]]:
    """Give the model the statistics of all batches; what that was, and the buffers that it changed.

    Raises:
        InvalidInputError: the calibration data will not do.
    """
    with _loaded(setting, weights) as (_, model):
        merged = merge_moments(each.moments for each in collected)
        apply_moments(model, merged)
        report = BatchNormReport(
            "exact",
            num_layers=len(merged),
            num_batches=len(collected) if merged else 0,
            num_samples=sum(each.num_samples for each in collected) if merged else 0,
            skipped=not merged,
        )
        before = _tensors(weights)
        return summary_of(report, model, before=before), changed_buffers(model, before)


def measure_before(setting: Setting, weights: Any) -> dict[str, float]:  # noqa: ANN401  a buffer
    """Held-out metrics of the weights with the buffers that they came with."""
    with _loaded(setting, weights) as (recipe, model):
        return recipe.evaluate(model, recipe.heldout_batches())


def values_of(
    setting: Setting,
    weights: Any,  # noqa: ANN401  a buffer
    buffers: Mapping[str, Tensor],
    part: Part,
) -> list[Mapping[str, Tensor]] | None:
    """The values of the samples in each batch of a part of the held-out data; None if the recipe tells none."""
    with _loaded(setting, weights, buffers) as (recipe, model):
        found: list[Mapping[str, Tensor]] = []
        for batch in part.take(recipe.heldout_batches()):
            each = recipe.evaluate_each(model, [batch])
            if each is None:
                return None
            found.append(each)
        return found


def measure_whole(setting: Setting, weights: Any, buffers: Mapping[str, Tensor]) -> Measured:  # noqa: ANN401  a buffer
    """All held-out data in one go."""
    with _loaded(setting, weights, buffers) as (recipe, model):
        return measure(recipe, model)


def distances(setting: Setting, averaged: Any, raw: Any) -> list[LayerDistance]:  # noqa: ANN401  buffers
    """How far averaged and raw weights are apart, layer by layer."""
    with _recipe(setting) as recipe:
        return measure_distances(recipe.build_model(), _tensors(averaged), _tensors(raw))


def measured_together(values: Sequence[Mapping[str, Tensor]]) -> Measured:
    """What the batches' values amount to."""
    names = values[0] if values else ()
    return measured_of({name: torch.cat([each[name] for each in values]) for name in names})


@contextmanager
def _recipe(setting: Setting) -> Iterator[Recipe]:
    """The recipe, as long as the context lasts: a package's files and modules are gone afterwards."""
    torch.set_num_threads(1)
    job = setting.job
    if setting.package is None:
        yield load_recipe(job.recipe, job.config, seed=job.seed)
        return
    with tempfile.TemporaryDirectory(prefix="wa-code-") as folder:
        code = Path(folder)
        unpack(setting.package, code)
        try:
            yield load_recipe(job.recipe, job.config, seed=job.seed, code=code)
        finally:
            _forget(code)


def _forget(code: Path) -> None:
    """Let no later part import what this one had."""
    sys.path[:] = [entry for entry in sys.path if entry != str(code)]
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{code}/"):
            del sys.modules[name]


@contextmanager
def _loaded(
    setting: Setting,
    weights: Any,  # noqa: ANN401  a buffer
    buffers: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Recipe, nn.Module]]:
    with _recipe(setting) as recipe:
        model = recipe.build_model()
        model.load_state_dict({**_tensors(weights), **(buffers or {})}, strict=True)
        yield recipe, model


def _tensors(weights: Any) -> dict[str, Tensor]:  # noqa: ANN401  a buffer
    return read_checkpoint([cast("bytes", memoryview(weights))]).tensors
