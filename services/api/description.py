"""Completes the OpenAPI description: the refusals that every route shares, examples, and who needs a token.

Works on the finished document, so that a new route has all of it without asking.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from services.api.examples import ANSWERS, PROBLEM_CODES, REQUESTS
from services.api.problems import MEDIA_TYPE, RETRY_AFTER_S, HttpProblem, problem_document

if TYPE_CHECKING:
    from collections.abc import Iterator

Json = dict[str, Any]

TAGS = [
    {"name": "runs", "description": "Submit, list and watch runs, and say what is to become of them."},
    {"name": "averages", "description": "A run's averages, and their weights to download."},
    {"name": "feeds", "description": "What grows while a run trains: events, log lines, metrics."},
    {"name": "packages", "description": "User code for runs to name."},
    {"name": "service", "description": "The service itself. These need no token."},
]
_EVERYWHERE = ("400", "408", "413", "429", "431", "500", "503")  # of the service's guards, before any route
_WITH_TOKEN = ("401", "403")
_OPEN = frozenset({"/livez", "/readyz", "/version", "/metrics"})
_WORDS = {
    "400": "the request cannot be read",
    "401": "no token, or a wrong one",
    "403": "the token lacks the scope",
    "404": "there is no such thing",
    "408": "the body came too slowly",
    "409": "not in the state that it is in; the code says why",
    "412": "If-Match names other content",
    "413": "the body is too large",
    "415": "the body is of another type",
    "416": "the range is outside the file",
    "422": "the request makes no sense; `errors` points at what is wrong",
    "429": "too many requests; Retry-After says when to go on",
    "431": "the headers are too large",
    "500": "something that nobody foresaw",
    "501": "not for what this run trains",
    "502": "what works for the service has failed",
    "503": "the object store is away, or slow; Retry-After says when to try again",
    "504": "what works for the service has taken too long",
}


def complete(document: Json, *, is_open: bool) -> Json:
    """The description, with what routes do not say themselves. Changes it in place.

    Args:
        document: the description.
        is_open: nobody needs a token.
    """
    document["tags"] = TAGS + [{"name": name} for name in _other_tags(document)]
    for path, operation in _operations(document):
        needs_token = not is_open and path not in _OPEN
        if not needs_token:
            operation["security"] = []
        for parameter in operation.get("parameters", ()):
            _drop_null(parameter)
        responses = operation["responses"]
        for status in (*_EVERYWHERE, *(_WITH_TOKEN if needs_token else ())):
            responses.setdefault(status, {})
        for status in [status for status in responses if status in _WORDS]:
            responses[status] = _problem(status)
        operation["responses"] = dict(sorted(responses.items()))
        _add_examples(operation)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which no route answers with
        document["components"]["schemas"].pop(name, None)
    return document


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def _other_tags(document: Json) -> list[str]:
    known = {tag["name"] for tag in TAGS}
    return sorted({tag for _, operation in _operations(document) for tag in operation.get("tags", ())} - known)


def _drop_null(parameter: Json) -> None:
    """A parameter is there or it is not: none of them can be null."""
    schema = parameter["schema"]
    choices = [choice for choice in schema.pop("anyOf", ()) if choice != {"type": "null"}]
    if len(choices) == 1:
        schema.update(choices[0] | {key: schema[key] for key in schema.keys() - choices[0].keys()})
    elif choices:
        schema["anyOf"] = choices


def _problem(status: str) -> Json:
    number = int(status)
    example = problem_document(HttpProblem(_WORDS[status], status=number, code=PROBLEM_CODES[status]))
    schema = {"$ref": "#/components/schemas/Problem"}
    answer: Json = {
        "description": f"{HTTPStatus(number).phrase}: {_WORDS[status]}",
        "content": {MEDIA_TYPE: {"schema": schema, "example": example}},
    }
    if status in {"429", "503"}:
        retry = {"schema": {"type": "integer", "example": RETRY_AFTER_S}, "description": "seconds"}
        answer["headers"] = {"Retry-After": retry}
    return answer


def _add_examples(operation: Json) -> None:
    name = operation["operationId"]
    if name in REQUESTS:
        operation["requestBody"]["content"]["application/json"]["example"] = REQUESTS[name]
    for status, answer in operation["responses"].items():
        content = answer.get("content", {}).get("application/json")
        if status.startswith("2") and content is not None and name in ANSWERS:
            content["example"] = ANSWERS[name]
