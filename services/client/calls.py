"""What the REST API can be asked for: one function for each route, which returns the request and reads the answer.

Nothing is sent here. Both clients send these, so paths, parameters and types are written once. A `Call` also
says whether sending it twice does no more than sending it once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from services.client.answers import (
    AddedAverage,
    Average,
    Checkpoint,
    Delivery,
    Event,
    Generation,
    Landscape,
    LogLine,
    Metrics,
    Package,
    Page,
    Predicted,
    Preview,
    Readiness,
    Run,
    Token,
    Version,
)
from wa_core.errors import InvalidInputError

T = TypeVar("T")
Json = Mapping[str, Any]
Query = Mapping[str, str | int | float | bool | None]

#: What a prediction may take beyond the usual: the first one imports torch, on a machine that may be busy.
_MODEL_START_S = 90.0


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its answer is read.

    Attributes:
        method: of HTTP.
        path: below the service's address.
        read: makes the result of the JSON that comes.
        query: parameters; those that are None are left out.
        body: sent as JSON, unless None.
        content: sent as it is, unless None.
        headers: beside those of every request.
        is_repeatable: whether it may be sent again when nobody knows what became of it.
        extra_s: how much longer than usual the service has been asked to take.
        is_text: whether the answer is text rather than JSON.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    query: Query = field(default_factory=dict)
    body: object = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_repeatable: bool = False
    extra_s: float = 0.0
    is_text: bool = False


# -- the service --------------------------------------------------------------------------------------------------


def version() -> Call[Version]:
    """``version`` and ``format`` of the service."""
    return _get("/version", Version.model_validate)


def ready() -> Call[Readiness]:
    """``status`` and ``checks`` of a service that is ready; `ApiError` 503 of one that is not."""
    return _get("/readyz", Readiness.model_validate)


# -- runs ---------------------------------------------------------------------------------------------------------


def submit(request: Json, *, key: str | None = None) -> Call[Run]:
    """Submit a run, and return it.

    It is sent with an Idempotency-Key, `key` or a new one, and again while the service is away: that makes one
    run, however often it arrives.
    """
    headers = {"Idempotency-Key": key or uuid.uuid4().hex}
    return Call("POST", "/v1/runs", Run.model_validate, body=request, headers=headers, is_repeatable=True)


def upload_package(body: bytes) -> Call[Package]:
    """Upload a zip of Python code; its ``package`` is what a submission names. The same bytes are kept once."""
    return Call(
        "POST",
        "/v1/packages",
        Package.model_validate,
        content=body,
        headers={"Content-Type": "application/zip"},
        is_repeatable=True,
    )


def runs(
    *,
    state: str | None = None,
    label: str | None = None,
    owner: str | None = None,
    since: str | None = None,
    limit: int | None = None,
    after: str | None = None,
) -> Call[Page[Run]]:
    """One page of runs, newest first; `label` is ``key:value``, `since` an ISO time; `after` a page's `next`."""
    query = {
        "state": state,
        "label": label,
        "owner": owner,
        "created_after": since,
        "limit": limit,
        "after": after,
    }
    return _get("/v1/runs", Page[Run].model_validate, query)


def run(run_id: str, *, wait_s: float | None = None) -> Call[Run]:
    """One run; with `wait_s`, as soon as something about it changes or after that many seconds."""
    return _get(_run(run_id), Run.model_validate, {"wait": wait_s}, extra_s=wait_s or 0.0)


def cancel(run_id: str) -> Call[Run]:
    """Ask for a run's end, and return the run."""
    return Call("POST", f"{_run(run_id)}:cancel", Run.model_validate)


def pause(run_id: str) -> Call[Run]:
    """Ask a run to pause after a last checkpoint, and return the run."""
    return Call("POST", f"{_run(run_id)}:pause", Run.model_validate)


def resume(
    run_id: str,
    *,
    from_step: int | None = None,
    lr_scale: float | None = None,
    skip_batches: int | None = None,
) -> Call[Run]:
    """Let a paused run go on, or let one go back to the newest kept checkpoint at or before `from_step`.

    From there on learning rates are multiplied by `lr_scale`, and the next `skip_batches` batches left out.
    `ApiError` with the code ``step_not_kept`` names the steps that are.
    """
    changes = _given(from_step=from_step, lr_scale=lr_scale, skip_batches=skip_batches)
    return Call("POST", f"{_run(run_id)}:resume", Run.model_validate, body=changes or None)


def events(run_id: str, *, after: int = 0, limit: int | None = None) -> Call[Page[Event]]:
    """One page of the run's log after entry `after`; `next` is where to go on, also at the end."""
    return _get(f"{_run(run_id)}/events", Page[Event].model_validate, {"after": after, "limit": limit})


def logs(
    run_id: str,
    *,
    rank: int | str = 0,
    attempt: int | None = None,
    after: str | None = None,
    limit: int | None = None,
) -> Call[Page[LogLine]]:
    """One page of the lines of a rank, or of ``"driver"``; `attempt` None reads all attempts in order.

    `next` is where to go on, also at the end.
    """
    query = {"rank": rank, "attempt": attempt, "after": after, "limit": limit}
    return _get(f"{_run(run_id)}/logs", Page[LogLine].model_validate, query)


def metrics(run_id: str, *, after: str | None = None, limit: int | None = None) -> Call[Page[Metrics]]:
    """One page of metric lines, oldest first; `next` is where to go on, also at the end."""
    return _get(f"{_run(run_id)}/metrics", Page[Metrics].model_validate, {"after": after, "limit": limit})


def deliveries_page(run_id: str, *, after: str | None = None, limit: int | None = None) -> Call[Page[Delivery]]:
    """One page of the messages to a run's webhooks, by webhook and event."""
    return _get(f"{_run(run_id)}/deliveries", Page[Delivery].model_validate, {"after": after, "limit": limit})


# -- what a run made ----------------------------------------------------------------------------------------------


def checkpoints_page(run_id: str, *, after: str | None = None, limit: int | None = None) -> Call[Page[Checkpoint]]:
    """One page of committed checkpoints, in order."""
    query = {"after": after, "limit": limit}
    return _get(f"{_run(run_id)}/checkpoints", Page[Checkpoint].model_validate, query)


def averages(run_id: str) -> Call[list[Average]]:
    """The run's averages, as they were asked for."""
    return _get(f"{_run(run_id)}/averages", _data(Average))


def average(
    run_id: str, name: str, *, generation: int | None = None, step: int | None = None, at: str | None = None
) -> Call[Average]:
    """One average: its newest state, or that of a generation, of a step, or ``at="best"``."""
    query = {"generation": generation, "step": step, "at": at}
    return _get(_average(run_id, name), Average.model_validate, query)


def add_average(
    run_id: str, name: str, rule: str, *, accumulator_dtype: str | None = None, dry_run: bool = False
) -> Call[AddedAverage]:
    """Add an average, also to a run that has ended; its `prediction` says how it catches up, and how well.

    With `dry_run` nothing is added. `ApiError` with the code ``cannot_rebuild`` says that too little is kept,
    ``average_exists`` that the name is taken.
    """
    body = {"name": name, "rule": rule, "dry_run": dry_run, **_given(accumulator_dtype=accumulator_dtype)}
    return Call("POST", f"{_run(run_id)}/averages", AddedAverage.model_validate, body=body, is_repeatable=dry_run)


def preview_average(run_id: str, rule: str) -> Call[Preview]:
    """What another rule would make of a run: coefficients by step, and the predicted error. Adds nothing."""
    path = f"{_run(run_id)}/averages:preview"
    return Call("POST", path, Preview.model_validate, body={"rule": rule}, is_repeatable=True)


def generations(
    run_id: str, name: str, *, after: int | None = None, limit: int | None = None, every: bool = False
) -> Call[Page[Generation]]:
    """One page of an average's history, oldest first; with `every`, also what was never measured."""
    query = {"after": after, "limit": limit, "all": 1 if every else None}
    return _get(f"{_average(run_id, name)}/generations", Page[Generation].model_validate, query)


def landscapes(run_id: str, name: str) -> Call[list[Landscape]]:
    """The landscapes of an average that were asked for."""
    return _get(f"{_average(run_id, name)}/landscapes", _data(Landscape))


def landscape(run_id: str, name: str, landscape_id: str) -> Call[Landscape]:
    """One landscape, or how far it is."""
    return _get(f"{_average(run_id, name)}/landscapes/{_part(landscape_id)}", Landscape.model_validate)


def start_landscape(run_id: str, name: str, *, kind: str = "line", points: int | None = None) -> Call[Landscape]:
    """Have the loss measured around an average: along the ``line`` from raw to average, or on a ``plane``."""
    body = {"kind": kind, **_given(points=points)}
    return Call("POST", f"{_average(run_id, name)}/landscapes", Landscape.model_validate, body=body)


def predict(
    run_id: str,
    name: str,
    instances: Sequence[object],
    *,
    generation: int | None = None,
    step: int | None = None,
    at: str | None = None,
) -> Call[Predicted]:
    """Ask a published average what it makes of `instances`, in the form that the run's recipe takes.

    `ApiError` with the code ``invalid_instances`` says what is wrong with which, ``prediction_not_supported``
    that the run's recipe cannot be asked.
    """
    query = {"generation": generation, "step": step, "at": at}
    path, body = f"{_average(run_id, name)}:predict", {"instances": list(instances)}
    return Call(
        "POST", path, Predicted.model_validate, query=query, body=body, is_repeatable=True, extra_s=_MODEL_START_S
    )


def model_card(run_id: str, name: str, *, generation: int | None = None) -> Call[str]:
    """The model card of published weights: Markdown, with the front matter of a Hugging Face repository."""
    path = f"{_average(run_id, name)}/model-card"
    return Call("GET", path, str, query={"generation": generation}, is_repeatable=True, is_text=True)


def model_config(run_id: str, name: str, *, generation: int | None = None) -> Call[dict[str, Any]]:
    """What it takes to build the model of published weights: recipe, package, config, seed."""
    return _get(f"{_average(run_id, name)}/config.json", dict, {"generation": generation})


def coefficients(run_id: str, name: str, *, generation: int | None = None) -> Call[dict[str, Any]]:
    """The checkpoints in published weights, each with its coefficient and sha256, as ``data``."""
    return _get(f"{_average(run_id, name)}/coefficients", dict, {"generation": generation})


def provenance(run_id: str, name: str, *, generation: int | None = None) -> Call[dict[str, Any]]:
    """What published weights were made of, and how: an in-toto statement."""
    return _get(f"{_average(run_id, name)}/provenance", dict, {"generation": generation})


def file_of(
    run_id: str, name: str, *, file: str, at: str | int | None, generation: int | None
) -> tuple[str, Query]:
    """Path and query of a file of an average."""
    query = {"generation": generation, "step": at} if isinstance(at, int) else {"generation": generation, "at": at}
    return f"{_average(run_id, name)}/{_part(file)}", query


def raw_file_of(run_id: str, *, step: int | None) -> str:
    """Path of the raw weights of a checkpoint."""
    return f"{_run(run_id)}/checkpoints/{'latest' if step is None else step}/weights.safetensors"


# -- tokens -------------------------------------------------------------------------------------------------------


def tokens() -> Call[list[Token]]:
    """The tokens that were made and not revoked, without their secrets; takes an admin's token."""
    return _get("/v1/tokens", _data(Token))


def create_token(name: str, scopes: Sequence[str], *, expires_in_s: int | None = None) -> Call[Token]:
    """Make a token, such as for ``["runs:read", "runs:write"]``; its `secret` is never shown again."""
    body = {"name": name, "scopes": list(scopes), **_given(expires_in_s=expires_in_s)}
    return Call("POST", "/v1/tokens", Token.model_validate, body=body)


def revoke_token(token_id: str) -> Call[None]:
    """Revoke a token, for good."""
    return Call("DELETE", f"/v1/tokens/{_part(token_id)}", _nothing, is_repeatable=True)


def _run(run_id: str) -> str:
    return f"/v1/runs/{_part(run_id)}"


def _average(run_id: str, name: str) -> str:
    return f"{_run(run_id)}/averages/{_part(name)}"


def _part(text: str) -> str:
    # Servers read %2F as a slash, so either would ask for something else.
    if not text or "/" in text:
        raise InvalidInputError(f"{text!r} is no id and no name of anything; ids and names have no slash")
    return quote(text, safe="")


def _get(path: str, read: Callable[[Any], T], query: Query | None = None, *, extra_s: float = 0.0) -> Call[T]:
    return Call("GET", path, read, query=query or {}, is_repeatable=True, extra_s=extra_s)


def _data(kind: type[T]) -> Callable[[Any], list[T]]:
    """Reads a whole list."""
    adapter = TypeAdapter(list[kind])  # type: ignore[valid-type]  # a type that is an argument
    return lambda said: adapter.validate_python(said["data"])


def _nothing(_said: object) -> None:
    return None


def _given(**asked: object) -> dict[str, object]:
    """What was asked for; nothing of what was not."""
    return {name: value for name, value in asked.items() if value is not None}
