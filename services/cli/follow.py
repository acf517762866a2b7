"""Follows a run to its end: a live bar on a terminal, plain lines anywhere else. Always on stderr.

Only looks; whatever happens here, the run goes on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from services.cli.console import notices, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.client import Client
    from services.client.answers import Run
    from services.client.calls import Json

POLL_S = 0.5
_PLAIN_EVERY_S = 2.0
NUM_LAST_LINES = 20


class View(Protocol):
    """Something that shows a run while it is followed."""

    def __enter__(self) -> Self:
        """Begin showing."""
        ...

    def __exit__(self, *_: object) -> None:
        """Leave the last picture standing."""
        ...

    def update(self, run: Json, averages: Sequence[Json]) -> None:
        """Show how things are now."""
        ...


def follow(client: Client, run_id: str) -> Run:
    """Show the run until it has ended, and return it."""
    with open_view() as view:
        while True:
            run = client.run(run_id)
            view.update(run, client.averages(run_id))
            if run.has_ended:
                return run
            time.sleep(POLL_S)


def open_view() -> View:
    """The view that fits where stderr goes."""
    return _LiveView() if notices().is_terminal else _PlainView()


def last_log_lines(client: Client, run_id: str, *, count: int = NUM_LAST_LINES) -> list[str]:
    """The last lines that rank 0 wrote, or the driver if rank 0 wrote none."""
    for rank in (0, "driver"):
        lines: list[str] = []
        after = None
        while True:
            page = client.logs(run_id, rank=rank, after=after)
            lines += [line["text"] for line in page["data"]]
            if not page["has_more"]:
                break
            after = page["next"]
        if lines:
            return lines[-count:]
    return []


def reason_of(run: Json) -> str:
    """Why a run failed, in one line."""
    reason = run.get("reason") or {}
    return f"{reason.get('code', 'unknown')}: {reason.get('message', '')}".rstrip(": ")


def summary(run: Json) -> str:
    """A run's progress in one line."""
    total = run.get("total_steps")
    steps = f"step {run['step']}/{total}" if total else f"step {run['step']}"
    numbers = "".join(f"  {name} {shown(value)}" for name, value in run.get("metrics", {}).items())
    eta_s = run.get("eta_s")
    left = f"  {_duration(eta_s)} left" if eta_s else ""
    return f"{run['state']:<10}  {steps}{numbers}{left}"


def _duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if minutes < 2:  # noqa: PLR2004  below that seconds say more
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"  # noqa: PLR2004  an hour


def average_line(average: Json) -> str:
    """An average's progress in one line: how much is in it, and how it does beside the raw weights."""
    line = f"{average['name']}  n_averaged {average['n_averaged']}"
    for which in ("averaged", "raw"):
        if metrics := measured_metrics(average, which):
            line += f"  {which}: " + ", ".join(f"{name} {shown(value)}" for name, value in metrics.items())
    return f"{line}  {told}" if (told := verdict(average)) else line


def verdict(average: Json) -> str:
    """Who won, by how much and how certainly, or why nobody can say; empty while there is nothing to say."""
    batchnorm = average.get("batchnorm") or {}
    if found := (average.get("evaluation") or {}).get("comparison"):
        outcome = {"averaged": "averaged wins", "raw": "raw wins"}.get(found["won"], "tie")
        difference, low, high = (f"{found[key]:#.2g}" for key in ("difference", "low", "high"))
        return f"{outcome}: {found['metric']} {difference} [{low}, {high}]"
    if batchnorm.get("status") == "failed":
        return f"not compared: {batchnorm.get('code')}"
    is_measured = measured_metrics(average, "averaged") and measured_metrics(average, "raw")
    return "not compared: too few held-out batches, and no evaluate_each" if is_measured else ""


def measured_metrics(average: Json, which: str) -> Json:
    """Held-out metrics of ``averaged`` or ``raw`` weights; empty when they were not measured."""
    measured = (average.get("evaluation") or {}).get(which) or {}
    return {name: value for name, value in measured.items() if name != "step"}


class _PlainView:
    """A line when the state changes, and one every few seconds while steps go by."""

    def __init__(self) -> None:
        self._state = ""
        self._step = -1
        self._averages: list[str] = []
        self._said_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, run: Json, averages: Sequence[Json]) -> None:
        """Print what is new."""
        lines = [average_line(average) for average in averages]
        is_new_state = run["state"] != self._state
        is_due = time.monotonic() - self._said_at >= _PLAIN_EVERY_S
        if not is_new_state and not (is_due and (run["step"], lines) != (self._step, self._averages)):
            return
        console = notices()
        console.print(Text(summary(run)), soft_wrap=True)
        for line in lines:
            if line not in self._averages:
                console.print(Text(f"            {line}"), soft_wrap=True)
        self._state, self._step, self._averages = run["state"], run["step"], lines
        self._said_at = time.monotonic()


class _LiveView:
    """A bar, and a line for every average, redrawn in place."""

    def __init__(self) -> None:
        self._console = notices()
        self._progress = Progress(
            TextColumn("[bold]{task.fields[state]:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
        )
        self._task: TaskID = self._progress.add_task("", total=None, state="", numbers="", left="")
        self._live = Live(self._progress, console=self._console, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, run: Json, averages: Sequence[Json]) -> None:
        """Redraw."""
        numbers = "  ".join(f"{name} {shown(value)}" for name, value in run.get("metrics", {}).items())
        self._progress.update(
            self._task,
            completed=run["step"],
            total=run.get("total_steps"),
            state=run["state"],
            numbers=numbers,
            left=f"{_duration(run['eta_s'])} left" if run.get("eta_s") else "",
        )
        rows = Table.grid(padding=(0, 1))
        for average in averages:
            rows.add_row(Text(" "), Text(average_line(average)))
        self._live.update(Group(self._progress, rows))
