"""All that a run's page shows, gathered at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.api.answers.resources import average_resources, checkpoint_resources, run_resource
from services.api.asked.wishes import CANCELLABLE
from services.api.dashboard.bars import DistanceBar, DriftBar, distance_bars, drift_bars
from services.api.dashboard.charts import chart_data
from services.api.dashboard.generations import metric_names, newest_generations
from services.api.dashboard.rendering import digest
from services.api.dashboard.timeline import Tick, timeline
from services.api.dashboard.verdicts import Verdict, verdict_of
from wa_core.errors import AverageNotFoundError
from wa_core.records import AveragingState, RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.api.answers.history import History
    from services.api.schemas import AverageResource, GenerationResource, RunResource
    from services.api.state.catalog import Catalog
    from wa_core.records import Entry

MAX_EVENTS = 200
MAX_TICKS = 2000  # as many as a chart can show; of a longer run the newest

_PAUSABLE = CANCELLABLE - {RunState.PAUSING, RunState.PAUSED}


@dataclass(frozen=True, slots=True)
class RunPage:
    """A run, its averages, and everything about the one that was chosen."""

    run: RunResource
    averages: Sequence[AverageResource]
    verdicts: dict[str, Verdict | None]
    chosen: AverageResource | None
    ticks: Sequence[Tick]
    generations: Sequence[GenerationResource]
    entries: Sequence[Entry]
    files: frozenset[str]

    @property
    def digest(self) -> str:
        """Changes whenever anything on the page does."""
        chosen = self.chosen.name if self.chosen else None
        return digest(
            self.run, self.averages, chosen, len(self.entries), [at.generation for at in self.generations]
        )

    @property
    def is_live(self) -> bool:
        """Whether the page will change by itself."""
        is_settled = self.run.averaging_state is AveragingState.PUBLISHED
        return not self.run.state.is_terminal or (bool(self.averages) and not is_settled)

    @property
    def has_numbers(self) -> bool:
        """Whether there is something to draw, or will be."""
        return self.is_live or bool(self.ticks)

    @property
    def verdict(self) -> Verdict | None:
        """Of the chosen average."""
        return self.verdicts.get(self.chosen.name) if self.chosen else None

    @property
    def metrics(self) -> list[str]:
        """The held-out metrics that were measured."""
        return metric_names(self.generations)

    @property
    def charts(self) -> dict[str, Any]:
        """What the browser draws."""
        return chart_data(self.generations, self.ticks)

    @property
    def layers(self) -> list[DistanceBar]:
        """How far the average is from the newest raw iterate, per layer."""
        return distance_bars(self.chosen.layers) if self.chosen else []

    @property
    def drifts(self) -> list[DriftBar]:
        """How far recalibration moved each BatchNorm layer."""
        return drift_bars(self.chosen.batchnorm.layers) if self.chosen and self.chosen.batchnorm else []

    @property
    def settings(self) -> str:
        """What was asked for, as JSON."""
        asked = {"recipe", "package", "config", "scaling", "checkpoint", "training", "averages", "labels"}
        more = {"priority", "max_failures", "deadlines", "seed"}
        return self.run.model_dump_json(include=asked | more, indent=2)

    @property
    def events(self) -> list[Entry]:
        """The newest entries of the run's log, newest first."""
        return list(reversed(self.entries[-MAX_EVENTS:]))

    @property
    def can_cancel(self) -> bool:
        """Whether a cancel would be heard."""
        return self.run.state in CANCELLABLE and self.run.desired_state != "cancelled"

    @property
    def can_pause(self) -> bool:
        """Whether a pause would be heard."""
        return self.run.state in _PAUSABLE and self.can_cancel

    @property
    def can_resume(self) -> bool:
        """Whether the run waits for somebody to let it go on."""
        return self.run.state is RunState.PAUSED and self.can_cancel


def run_page(catalog: Catalog, history: History, run_id: str, *, name: str | None) -> RunPage:
    """Gather the page of a run, with the average `name` (None: its first) in view.

    Raises:
        RunNotFoundError: there is no such run.
        AverageNotFoundError: it has no such average.
    """
    snapshot = catalog.snapshot(run_id)
    averages = average_resources(snapshot)
    chosen = _chosen(averages, run_id, name)
    served = next((each for each in snapshot.averages if chosen and each.name == chosen.name), None)
    checkpoints = checkpoint_resources(snapshot.entries)
    return RunPage(
        run=run_resource(snapshot),
        averages=averages,
        verdicts={average.name: verdict_of(average) for average in averages},
        chosen=chosen,
        ticks=timeline(checkpoints[-MAX_TICKS:], chosen, served.newest if served else None) if chosen else [],
        generations=newest_generations(catalog, history, run_id, chosen.name) if chosen else [],
        entries=snapshot.entries,
        files=frozenset(served.served.files) if served and served.served else frozenset(),
    )


def _chosen(averages: Sequence[AverageResource], run_id: str, name: str | None) -> AverageResource | None:
    if name is None:
        return averages[0] if averages else None
    found = next((average for average in averages if average.name == name), None)
    if found is None:
        raise AverageNotFoundError(f"run {run_id} has no average {name[:100]!r}")
    return found
