"""The assess child process: recalibrates BatchNorm and measures weights on held-out data.

It runs user code (a recipe), so it is a process of its own: without credentials, killable, the first to go when
memory runs out, and able to change nothing but the BatchNorm buffers it hands back. It reads one folder a line on
stdin and answers with findings on stdout (`services.averager.protocol`). What it has measured once it does not
measure again: weights, recipe, config, seed and data all being the same, the answer is. It ends when stdin does.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

from services.averager.layers import measure_distances
from services.averager.measuring import (
    Measured,
    Trial,
    compare_measured,
    data_digest,
    finite,
    measure_weights,
    try_average,
)
from services.averager.protocol import (
    MESSAGE_LIMIT,
    AverageFound,
    JobDone,
    JobFailed,
    JobFile,
    RawFound,
    buffers_path,
    job_path,
    raw_path,
    value_path,
)
from services.recipes.loader import load_recipe
from services.runtime.confined import take_stdout, yield_to_others
from wa_core.averaging.files.sources import open_source, specs_of
from wa_core.records import BatchNormSummary
from wa_core.tensors import map_checkpoint, serialize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from services.averager.protocol import Finding
    from wa_core.recipe import Recipe
    from wa_core.records import LayerDistance

T = TypeVar("T")

NICENESS = 10
MAX_RESULTS_KEPT = 32
_BLOCK_BYTES = 1 << 20


def main(load: Load = load_recipe) -> int:
    """Serve jobs until stdin ends; `load` finds the recipe that a job names."""
    yield_to_others(niceness=NICENESS)  # measuring must not slow the trainer down
    torch.set_num_threads(1)
    answers = take_stdout()
    assessing = Assessing(load)
    for line in sys.stdin:
        for finding in assessing.findings(Path(json.loads(line))):
            answers.write(finding.model_dump_json() + "\n")
            answers.flush()
    return 0


class Load(Protocol):
    """Finds a recipe."""

    def __call__(
        self, recipe: str, config: Mapping[str, object], *, seed: int, code: Path | None = None
    ) -> Recipe:
        """Build `recipe` (``package.module:Class``) with its config, from the folder `code` if it is given."""
        ...


class Assessing:
    """Does jobs one after the other, and keeps the results of the last ones."""

    def __init__(self, load: Load = load_recipe) -> None:
        self._load = load
        self._digests: _Kept[str] = _Kept(MAX_RESULTS_KEPT)
        self._raw: _Kept[Measured] = _Kept(MAX_RESULTS_KEPT)
        self._trials: _Kept[Trial] = _Kept(MAX_RESULTS_KEPT)

    def findings(self, folder: Path) -> Iterator[Finding]:
        """Do the job in `folder`; whatever user code raises is a finding."""
        try:
            job = JobFile.model_validate_json(job_path(folder).read_bytes())
            setting = self._set_up(job)
        except Exception as error:  # noqa: BLE001  user code may raise anything; the parent records it
            yield JobFailed(message=describe(error))
            return
        raw = self._measure_raw(setting, raw_path(folder)) if job.has_raw else None
        yield RawFound(metrics=finite(raw.metrics) if raw else None, data_sha256=setting.data_sha256)
        for name in job.averages:
            yield self._assess(setting, name, folder, raw, has_raw=job.has_raw)
        yield JobDone()

    def _set_up(self, job: JobFile) -> _Setting:
        recipe = self._load(job.recipe, job.config, seed=job.seed, code=Path(job.code) if job.code else None)
        about = json.dumps([job.recipe, job.code, job.config, job.seed], sort_keys=True)
        data_sha256 = self._digests.get(about, lambda: data_digest(recipe))
        return _Setting(recipe, recipe.build_model(), about, data_sha256)

    def _measure_raw(self, setting: _Setting, path: Path) -> Measured | None:
        try:
            return self._raw.get(
                setting.key(path), lambda: measure_weights(setting.recipe, setting.model, map_checkpoint(path))
            )
        except Exception as error:  # noqa: BLE001  user code may raise anything; the averages are measured all the same
            describe(error)
            return None

    def _assess(
        self, setting: _Setting, name: str, folder: Path, raw: Measured | None, *, has_raw: bool
    ) -> AverageFound:
        path = value_path(folder, name)
        try:
            trial = self._trials.get(
                setting.key(path), lambda: try_average(setting.recipe, setting.model, map_checkpoint(path))
            )
            layers = _distances(setting.model, path, raw_path(folder)) if has_raw else []
            return write_found(folder, name, trial, raw, layers=layers)
        except Exception as error:  # noqa: BLE001  user code may raise anything; the other averages are not held up
            summary = BatchNormSummary(status="failed", code="assess_failed", message=describe(error))
            return AverageFound(name=name, batchnorm=summary)


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the weights of one job are measured with."""

    recipe: Recipe
    model: nn.Module
    about: str
    data_sha256: str

    def key(self, path: Path) -> str:
        """What the results of measuring the weights in `path` depend on."""
        return f"{weights_digest(path)} {self.data_sha256} {self.about}"


class _Kept(Generic[T]):
    """The most recently used results."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: OrderedDict[str, T] = OrderedDict()

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The result kept for `key`, or a new one."""
        if key not in self._results:
            self._results[key] = make()
        self._results.move_to_end(key)
        while len(self._results) > self._size:
            self._results.popitem(last=False)
        return self._results[key]


def weights_digest(path: Path) -> str:
    """SHA-256, in hex, over names, dtypes, shapes and values in a safetensors file; not over its metadata."""
    source = open_source(path)
    try:
        digest = hashlib.sha256(repr(specs_of(source)).encode())
        buffer = memoryview(bytearray(_BLOCK_BYTES))
        for stretch in source.stretches(_BLOCK_BYTES):
            block = buffer[: stretch.end - stretch.begin]
            source.read_stretch(stretch, block)
            digest.update(block)
        return digest.hexdigest()
    finally:
        source.close()


def write_found(
    folder: Path, name: str, trial: Trial, raw: Measured | None, *, layers: list[LayerDistance]
) -> AverageFound:
    """The finding of an average, whose recalibrated buffers are then in their file."""
    if trial.buffers:
        buffers_path(folder, name).write_bytes(serialize(trial.buffers))
    return AverageFound(
        name=name,
        before=finite(trial.before),
        after=finite(trial.after.metrics) if trial.after else None,
        batchnorm=trial.batchnorm,
        comparison=compare_measured(trial.after, raw),
        layers=layers,
        has_buffers=bool(trial.buffers),
    )


def _distances(model: nn.Module, averaged: Path, raw: Path) -> list[LayerDistance]:
    return measure_distances(model, map_checkpoint(averaged), map_checkpoint(raw))


def describe(error: Exception) -> str:
    """In a line for the record; the whole of it goes to stderr."""
    traceback.print_exception(error)  # for whoever wrote the recipe
    return f"{type(error).__name__}: {error}"[:MESSAGE_LIMIT]


if __name__ == "__main__":
    sys.exit(main())
