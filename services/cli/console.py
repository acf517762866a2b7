"""What the commands print with: answers on stdout, everything else on stderr. Plain when piped.

No colour, no bar and no box unless a terminal is there; messages are never read as markup.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it

_SHOW_EVERY_S = 0.1
_PIPED_WIDTH = 240  # so that a piped table is never cut to the width of a terminal that is not there
_SIMPLE_VALUES = (str, int, float, bool)


def answers() -> Console:
    """The console on stdout."""
    return _console(is_stderr=False)


def notices() -> Console:
    """The console on stderr."""
    return _console(is_stderr=True)


def say(message: str) -> None:
    """One notice for a person, on stderr."""
    notices().print(Text(message), soft_wrap=True)


def answer(text: str) -> None:
    """Plain text on stdout."""
    answers().print(Text(text), soft_wrap=True)


def print_json(value: object) -> None:
    """One JSON document on one line of stdout; the client's answers are such as the service gave them."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=dict) + "\n")
    sys.stdout.flush()


def print_table(columns: list[str], rows: list[list[object]], *, title: str | None = None) -> None:
    """A table on stdout; columns whose values are all numbers are aligned to the right."""
    console = answers()
    with console.capture() as drawn:
        console.print(_table(columns, rows, title=title, is_terminal=console.is_terminal))
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


def follow_table(columns: list[str], look: Callable[[], list[list[object]]], *, every_s: float = 2.0) -> NoReturn:
    """A table on stdout that is kept up to date until Ctrl-C; piped, each row when it is new or has changed."""
    console = answers()
    if not console.is_terminal:
        seen: list[list[object]] = []
        while True:
            rows = look()
            for row in rows:
                if row not in seen:
                    answer("  ".join(shown(value) for value in row))
            sys.stdout.flush()
            seen = rows
            time.sleep(every_s)
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(_table(columns, look(), title=None, is_terminal=True), refresh=True)
            time.sleep(every_s)


def _table(columns: list[str], rows: list[list[object]], *, title: str | None, is_terminal: bool) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False, box=SIMPLE_HEAD)
    if not is_terminal:
        table.box, table.header_style = None, ""
    for index, column in enumerate(columns):
        is_number = all(isinstance(row[index], int | float) or row[index] is None for row in rows)
        # The first is what a person copies: on a narrow terminal the others give way.
        whole = max((len(shown(row[0])) for row in rows), default=0) if index == 0 else None
        table.add_column(column, justify="right" if rows and is_number else "left", no_wrap=True, min_width=whole)
    for row in rows:
        table.add_row(*(Text(shown(value)) for value in row))
    return table


@contextmanager
def bytes_bar(name: str) -> Iterator[Callable[[int, int], None] | None]:
    """What is told of (bytes done, bytes in all): a bar with the time left, on stderr; None without a terminal."""
    console = notices()
    if not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=None)
        shown_at = 0.0

        def on_progress(done: int, total: int) -> None:
            nonlocal shown_at
            if done == total or time.monotonic() - shown_at > _SHOW_EVERY_S:
                shown_at = time.monotonic()
                progress.update(task, completed=done, total=total)

        yield on_progress


def shown(value: object) -> str:
    """A value as a person reads it: four significant digits, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, _SIMPLE_VALUES):
        return str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={shown(inner)}" for key, inner in value.items()) or "-"
    return json.dumps(value, ensure_ascii=False)


def _console(*, is_stderr: bool) -> Console:
    stream = sys.stderr if is_stderr else sys.stdout
    is_terminal = stream.isatty()
    return Console(
        file=stream,
        highlight=False,
        force_terminal=is_terminal,  # FORCE_COLOR must not colour a pipe
        width=None if is_terminal else _PIPED_WIDTH,
    )
