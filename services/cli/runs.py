"""The commands that submit, show and end runs."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003  typer needs it at run time
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.arguments import (
    parse_averages,
    parse_config,
    parse_labels,
    parse_recipe,
    parse_since,
    parse_webhooks,
)
from services.cli.connection import connect
from services.cli.console import INTERRUPTED, answer, follow_table, print_json, print_table, say, shown
from services.cli.follow import average_line, follow, last_log_lines, reason_of, summary
from services.cli.options import ApiUrl, AsJson, RunId, Token
from wa_core.errors import InvalidInputError
from wa_core.packages import pack_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.client import Client
    from services.client.answers import Run
    from services.client.calls import Json

FOLLOW_PATIENCE_S = 60.0
_PAGE = 200  # the most that the service gives at once
_RUN_TITLES = ["RUN", "STATE", "AVERAGING", "STEP", "OF", "RECIPE", "CREATED"]
_RUN_COLUMNS = ("run_id", "state", "averaging_state", "step", "total_steps")


def submit(  # noqa: PLR0913  one parameter for each option of the command
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Short name (digits) or package.module:Class.")],
    *,
    package: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of Python code that RECIPE is in; it is sent and run.", show_default=False
        ),
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", metavar="KEY=VALUE", help="A setting of the recipe; may be repeated."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="DDP workers.")] = 2,
    min_workers: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Go on with as few after a loss.", show_default="as --workers"),
    ] = None,
    average: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]RULE", help="An average to keep, such as ema:half_life=60; may be repeated."),
    ] = None,
    every_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Keep the newest N checkpoints.", show_default="all are kept")
    ] = None,
    keep_every_steps: Annotated[
        int | None, typer.Option(min=1, help="Keep the first at or after each multiple of N.", show_default=False)
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option(min=1, help="Keep the N with the lowest held-out loss.", show_default=False)
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="How to train, such as precision=bf16; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label to find the run by; may be repeated.")
    ] = None,
    priority: Annotated[int, typer.Option(min=0, max=99, help="Lower numbers run first.")] = 50,
    queue_deadline: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long it may wait.", show_default="as long as it takes"),
    ] = None,
    run_deadline: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long it may train.", show_default="as long as it takes"),
    ] = None,
    webhook: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="An address to tell what happens; may be repeated.")
    ] = None,
    webhook_event: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EVENT",
            help="What to tell: failed, published, ...; may be repeated.",
            show_default="how the run ends",
        ),
    ] = None,
    is_followed: Annotated[
        bool, typer.Option("--follow", "-f", help="Show progress until the run has ended.")
    ] = False,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Submit a training run and print its id.

    Example: wa submit digits -c epochs=12 --average swa:start_step=100 --average mine=ema:half_life=60 --follow

    Example: wa submit moons:Moons --package examples/moons --average swa:start_step=50

    Example: wa submit digits --webhook https://example.com/hooks --webhook-event failed --webhook-event published
    """
    body = None if package is None else _packed(package)
    request: dict[str, object] = {
        "recipe": parse_recipe(recipe, is_packaged=body is not None),
        "config": parse_config(config or []),
        "scaling": {"num_workers": workers, **_given(min_workers=min_workers)},
        "checkpoint": {
            "every_steps": every_steps,
            **_given(keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best),
        },
        "training": parse_config(training or [], place="--training"),
        "averages": parse_averages(average or []),
        "labels": parse_labels(label or []),
        "priority": priority,
        "seed": seed,
        **_given(
            deadlines=_given(queue_s=queue_deadline, run_s=run_deadline) or None,
            webhooks=parse_webhooks(webhook or [], events=webhook_event or []) or None,
        ),
    }
    with connect(api_url, token, patience_s=FOLLOW_PATIENCE_S if is_followed else 0.0) as client:
        if body is not None:
            request["package"] = client.upload_package(body)["package"]
        run = client.submit(request)
        if is_followed:
            say(f"run {run['run_id']} submitted")
            run = follow_to_end(client, run["run_id"])
        print_json(run) if as_json else answer(run["run_id"])
    if is_followed and run["state"] != "succeeded":
        raise typer.Exit(1)


def _packed(folder: Path) -> bytes:
    try:
        return pack_folder(folder)
    except (InvalidInputError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="'--package'") from None


def runs(  # noqa: PLR0913  one parameter for each option of the command
    *,
    state: Annotated[str | None, typer.Option(help="Only runs in this state.", show_default=False)] = None,
    label: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE", help="Only runs with this label.", show_default=False)
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Only runs of this owner.", show_default=False)] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="AGE|DATE", help="Only newer runs: 30m, 2h, 7d, 2026-11-01.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most, newest first.")] = 20,
    is_followed: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep the table up to date until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """List runs, newest first.

    Example: wa runs --state running

    Example: wa runs --label team=vision --since 7d --json

    Example: wa runs --state running --follow
    """
    if is_followed and as_json:
        raise typer.BadParameter("a table is followed; for programs leave --json out.", param_hint="'--follow'")
    wanted = next((f"{key}:{value}" for key, value in parse_labels([label] if label else []).items()), None)
    after_date = None if since is None else parse_since(since, now=datetime.now(UTC))
    patience_s = FOLLOW_PATIENCE_S if is_followed else 0.0
    with connect(api_url, token, patience_s=patience_s) as client:

        def look() -> Json:
            return _listed(client, limit, state=state, label=wanted, owner=owner, since=after_date)

        if is_followed:
            try:
                follow_table(_RUN_TITLES, lambda: _run_rows(look()))
            except KeyboardInterrupt:
                raise typer.Exit(INTERRUPTED) from None
        page = look()
    if as_json:
        print_json(page)
        return
    print_table(_RUN_TITLES, _run_rows(page))
    if page["has_more"]:
        say(f"the newest {limit}; more with --limit")


def _run_rows(page: Json) -> list[list[object]]:
    return [
        [*(run[key] for key in _RUN_COLUMNS), _short_recipe(run["recipe"]), short_time(run["created_at"])]
        for run in page["data"]
    ]


def _short_recipe(recipe: str | None) -> str | None:
    """``digits:Digits`` of ``services.recipes.digits:Digits``: a row fits a terminal."""
    return recipe and recipe.rpartition(".")[2]


def _listed(client: Client, limit: int, **filters: str | None) -> Json:
    """The newest runs as one page, however many pages of the service's that takes."""
    data: list[Json] = []
    after = None
    while True:
        page = client.runs(**filters, limit=min(limit - len(data), _PAGE), after=after)
        data += page["data"]
        if not page.has_more or len(data) == limit:
            return {**page, "data": data}
        after = str(page.next)


def show(run_id: RunId, *, as_json: AsJson = False, api_url: ApiUrl = None, token: Token = None) -> None:
    """Show one run and its averages.

    Example: wa show 01JZ8W6J5N1V3C9T7Q2R4S6X8Y
    """
    with connect(api_url, token) as client:
        run = client.run(run_id)
        averages = client.averages(run_id)
    if as_json:
        print_json(run)
        return
    answer(f"{run['run_id']}  {summary(run)}")
    if run.get("reason"):
        answer(f"reason      {reason_of(run)}")
    for name in ("recipe", "config", "labels", "attempt", "averaging_state", "created_at", "updated_at"):
        answer(f"{name.removesuffix('_state'):<10}  {shown(run[name])}")
    for average in averages:
        answer(f"average     {average_line(average)}")


def cancel(run_id: RunId, *, as_json: AsJson = False, api_url: ApiUrl = None, token: Token = None) -> None:
    """End a run after a last checkpoint.

    Example: wa cancel RUN
    """
    with connect(api_url, token) as client:
        run = client.cancel(run_id)
    print_json(run) if as_json else answer(f"{run_id} will be cancelled (now {run['state']})")


def pause(run_id: RunId, *, as_json: AsJson = False, api_url: ApiUrl = None, token: Token = None) -> None:
    """Pause a run after a last checkpoint.

    A paused run holds no workers.

    Example: wa pause RUN
    """
    with connect(api_url, token) as client:
        run = client.pause(run_id)
    print_json(run) if as_json else answer(f"{run_id} will be paused (now {run['state']})")


def resume(
    run_id: RunId,
    *,
    from_step: Annotated[
        int | None,
        typer.Option(
            min=0, help="Go back to the newest kept checkpoint at or before this step.", show_default=False
        ),
    ] = None,
    lr_scale: Annotated[
        float | None, typer.Option(help="Multiply learning rates by this from there on.", show_default=False)
    ] = None,
    skip_batches: Annotated[
        int | None, typer.Option(min=0, help="Leave out the next so many batches.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Let a paused run go on, or any run go back to an older step.

    Example: wa resume RUN --from-step 1200 --lr-scale 0.5 --skip-batches 200
    """
    with connect(api_url, token) as client:
        run = client.resume(run_id, from_step=from_step, lr_scale=lr_scale, skip_batches=skip_batches)
    print_json(run) if as_json else answer(f"{run_id} will go on (now {run['state']})")


def follow_to_end(client: Client, run_id: str) -> Run:
    """Follow a run, and explain how it ended.

    Raises:
        typer.Exit: 130, when the user stops following; the run goes on.
    """
    with leaving(run_id):
        run = follow(client, run_id)
    explain_end(client, run)
    return run


@contextmanager
def leaving(run_id: str) -> Iterator[None]:
    """Say on Ctrl-C that only the following has ended.

    Raises:
        typer.Exit: 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped following; run {run_id} goes on. Look: wa show {run_id}. End it: wa cancel {run_id}.")
        raise typer.Exit(INTERRUPTED) from None


def explain_end(client: Client, run: Json) -> None:
    """Say why a run did not succeed: the last lines that it wrote, and its reason."""
    if run["state"] == "failed":
        for line in last_log_lines(client, run["run_id"]):
            say(f"  {line}")
        say(f"run {run['run_id']} failed: {reason_of(run)}")
    elif run["state"] != "succeeded":
        say(f"run {run['run_id']} was {run['state']}")


def short_time(text: str) -> str:
    """An ISO time to the second."""
    return text[:19].replace("T", " ")


def _given(**asked: object) -> dict[str, object]:
    """What was asked for; nothing of what was not."""
    return {name: value for name, value in asked.items() if value is not None}
