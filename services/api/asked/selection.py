"""Picks a generation of an average: the newest, a numbered one, that of a step, or the best measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from services.api.answers.resources import WEIGHTS_FILES, run_resource
from services.api.problems import HttpProblem
from wa_core.averaging.rules import parse_rule
from wa_core.errors import AverageNotFoundError, ConflictError, NoAverageYetError, NotFoundError

if TYPE_CHECKING:
    from services.api.state.catalog import Catalog
    from services.api.state.snapshots import RunSnapshot
    from wa_core.records import AssessmentRecord, AverageManifest, FileRef


@dataclass(frozen=True, slots=True)
class Selection:
    """Which generation a caller wants; all None is the newest."""

    generation: int | None = None
    step: int | None = None
    at: Literal["latest", "best"] | None = None

    def __post_init__(self) -> None:
        if sum(choice is not None for choice in (self.generation, self.step, self.at)) > 1:
            message = "generation, step and at each pick a generation; give one of them"
            raise HttpProblem(message, status=422, code="invalid_request", faults=[("query", message)])

    @property
    def is_newest(self) -> bool:
        """Whether the newest generation is wanted."""
        return self.generation is None and self.step is None and self.at != "best"


def select(
    catalog: Catalog, run_id: str, name: str, selection: Selection
) -> tuple[AverageManifest | None, AssessmentRecord | None]:
    """The generation to show, and the assessment whose weights are served with it; either may be None.

    Raises:
        NotFoundError: no such run, average or generation.
        ConflictError: the best is wanted, and none has been measured.
    """
    if selection.is_newest:
        average = catalog.average(run_id, name)
        return average.newest, average.served
    if selection.generation is not None:
        found = catalog.generation(run_id, name, selection.generation)
    elif selection.step is not None:
        found = _ending_at(catalog, run_id, name, step=selection.step)
    else:
        found = _best(catalog, run_id, name)
    return found, catalog.assessment(run_id, name, found.generation)


def best_generation(catalog: Catalog, run_id: str, name: str) -> int | None:
    """The best measured generation of an average, or None before any was measured."""
    served = catalog.average(run_id, name).served
    return served.best if served else None


def select_file(
    catalog: Catalog, run_id: str, name: str, selection: Selection, *, file: str
) -> tuple[AssessmentRecord, FileRef]:
    """The file (a key of `WEIGHTS_FILES`) of the generation wanted.

    Raises:
        HttpProblem: 409 ``no_average_yet``, nothing has been published; `progress` says how far the run is.
        NotFoundError: no such run, average, generation, or kind of file.
    """
    _, served = select(catalog, run_id, name, selection)
    if served is None:
        # What was seen a moment ago may do for an answer, but not for a refusal.
        run = catalog.snapshot(run_id, anew=True)
        if selection.is_newest:
            served = next((average.served for average in run.averages if average.name == name), None)
    if served is None:
        raise _nothing_yet(run, name)
    ref = served.files.get(WEIGHTS_FILES[file])
    if ref is None:
        there = ", ".join(given for given, stored in WEIGHTS_FILES.items() if stored in served.files)
        raise NotFoundError(
            f"generation {served.generation} of average {name!r} has no {file}; it has {there}",
            code="file_not_found",
        )
    return served, ref


def _ending_at(catalog: Catalog, run_id: str, name: str, *, step: int) -> AverageManifest:
    """The newest generation whose last checkpoint is of `step`, one with weights before one without."""
    ending = [found for found in catalog.generations(run_id, name) if found.last_step == step]
    if not ending:
        raise AverageNotFoundError(
            f"average {name!r} of run {run_id} has no generation that ends at step {step}",
            code="generation_not_found",
        )
    assessed = set(catalog.assessed_numbers(run_id, name))
    return next((found for found in ending if found.generation in assessed), ending[0])


def _best(catalog: Catalog, run_id: str, name: str) -> AverageManifest:
    served = catalog.average(run_id, name).served
    if served is None:
        raise _nothing_yet(catalog.snapshot(run_id, anew=True), name)
    if served.best is not None:
        return catalog.generation(run_id, name, served.best)
    raise ConflictError(
        f"no generation of average {name!r} has a held-out loss, so none is the best; ask for at=latest",
        code="no_evaluation",
    )


def _nothing_yet(snapshot: RunSnapshot, name: str) -> HttpProblem:
    """Why there are no weights yet, with the numbers that let a caller guess when there will be."""
    run = run_resource(snapshot)
    wanted = next(average for average in snapshot.wanted if average.name == name)
    newest = next(average.newest for average in snapshot.averages if average.name == name)
    progress = {
        "state": run.state,
        "step": run.step,
        "total_steps": run.total_steps,
        "start_step": parse_rule(wanted.rule).start_step,
        "num_checkpoints": len(snapshot.lineage),
        "n_averaged": newest.n_averaged if newest else 0,
    }
    return HttpProblem(
        f"average {name!r} ({wanted.rule}) has no published weights yet: {progress['num_checkpoints']} "
        f"checkpoints so far, {progress['n_averaged']} folded; it counts checkpoints from step "
        f"{progress['start_step']}, and the run ({run.state}) is at step {run.step} of "
        f"{run.total_steps or 'an unknown number'}",
        status=409,
        code=NoAverageYetError.kind,
        extra={"progress": progress},
    )
