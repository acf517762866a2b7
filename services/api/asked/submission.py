"""Checks a submission as a whole before a run exists, so that what is queued can start.

The form of the body has been checked already (`services.api.asked.body`); here it is held against what this
service can do: its recipes and its rules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from services.api.asked.keys import check_key
from services.api.problems import HttpProblem
from services.recipes.registry import check_recipe
from wa_core import layout
from wa_core.averaging.rules import parse_run_rule
from wa_core.catalog.packages import NOT_FOUND, fetch_package
from wa_core.catalog.runs import create_run
from wa_core.catalog.submissions import body_sha256_of, claim_key, finish
from wa_core.errors import ConflictError, InvalidInputError
from wa_core.packages import find_recipe
from wa_core.records import MAX_AVERAGES, RunSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.api.state.catalog import Catalog
    from services.api.state.index import Row
    from wa_core.averaging.rules import AnyRule
    from wa_core.records import AverageRequest, RunRequest
    from wa_core.store.base import ObjectStore

_POINTERS = {"invalid_config": "config", NOT_FOUND: "package"}


def check_submission(request: RunRequest, store: ObjectStore) -> None:
    """Refuse a submission that no trainer or averager here could carry out.

    The config of a package's recipe is known to its code alone, which is not run here: it is checked where the run
    is trained.

    Raises:
        HttpProblem: 422 ``package_not_found``, ``recipe_not_allowed``, ``unknown_recipe``, ``invalid_config`` or
            ``invalid_rule``; ``invalid_request`` for a label that could fool a terminal or a reader.
    """
    if faults := _label_faults(request.labels):
        detail = "; ".join(f"{pointer}: {message}" for pointer, message in faults[:5])
        raise HttpProblem(detail, status=422, code="invalid_request", faults=faults)
    try:
        if request.package is None:
            check_recipe(request.recipe, request.config)
        else:
            find_recipe(fetch_package(store, request.package), request.recipe)
    except InvalidInputError as error:
        faults = [(_POINTERS.get(error.code, "recipe"), error.message)]
        raise HttpProblem(error.message, status=422, code=error.code, faults=faults) from None
    if faults := _rule_faults(request.averages):
        detail = "; ".join(f"{pointer}: {message}" for pointer, message in faults[:5])
        raise HttpProblem(detail, status=422, code="invalid_rule", faults=faults)


def submitted_before(catalog: Catalog, request: RunRequest, *, key: str, owner: str) -> Row | None:
    """The run that a key stands for, if this replica made it and a look at it is not due; never waits.

    Its submission was checked when it came first.

    Raises:
        HttpProblem: 409 ``submission_in_progress``.
    """
    catalog.keys_in_use.check(owner, key)
    claim = catalog.claims.peek((owner, key))
    if claim is None or claim.body_sha256 != body_sha256_of(request) or not catalog.is_known(claim.run_id):
        return None
    return catalog.recent_row(claim.run_id)


def submitted_run(
    catalog: Catalog, request: RunRequest, *, key: str | None, owner: str, traceparent: str | None = None
) -> Row:
    """The row of a new run; or, with an Idempotency-Key, the one run that the key stands for.

    A run joins the trace of the request that creates it, a `traceparent`.

    Raises:
        HttpProblem: 422 ``invalid_idempotency_key``, 409 ``submission_in_progress``.
        InvalidInputError: the key stands for another submission (`idempotency_key_reused`).
    """
    store, clock = catalog.store, catalog.clock
    if key is None:
        now = clock.now()
        run_id = layout.new_run_id(now)
        spec = RunSpec(run_id=run_id, created_at=now, traceparent=traceparent, owner=owner, request=request)
        return catalog.adopt(spec, create_run(store, spec, clock=clock))
    check_key(key)
    with catalog.keys_in_use.using(owner, key):
        known = catalog.claims.peek((owner, key))
        claim = claim_key(store, request, key=key, clock=clock, owner=owner, known=known)
        catalog.claims.get((owner, key), lambda: claim.record)
        claim = replace(claim, spec=claim.spec.model_copy(update={"traceparent": traceparent}))
        if claim.is_new:
            return catalog.adopt(claim.spec, create_run(store, claim.spec, clock=clock))
        if not catalog.is_known(claim.spec.run_id):
            finish(store, claim, clock=clock)
        return catalog.row(claim.spec.run_id)


def check_rule(spelling: str) -> AnyRule:
    """The rule that is spelled so.

    Raises:
        HttpProblem: 422 ``invalid_rule``.
    """
    try:
        return parse_run_rule(spelling)
    except InvalidInputError as error:
        faults = [("rule", error.message)]
        raise HttpProblem(f"rule: {error.message}", status=422, code="invalid_rule", faults=faults) from None


def check_addition(average: AverageRequest, *, existing: Sequence[AverageRequest]) -> AnyRule:
    """Refuse an average that cannot be added to those that a run has; otherwise its rule.

    Raises:
        HttpProblem: 422 ``invalid_rule``.
        ConflictError: ``average_exists``, or ``too_many_averages``.
    """
    rule = check_rule(average.rule)
    if average.name in {known.name for known in existing}:
        raise ConflictError(f"the run has an average {average.name!r} already", code="average_exists")
    if len(existing) >= MAX_AVERAGES:
        raise ConflictError(
            f"the run has {len(existing)} averages, the most that it can have; submit another run for more",
            code="too_many_averages",
        )
    return rule


def _label_faults(labels: Mapping[str, str]) -> list[tuple[str, str]]:
    # Here and not in the record: a bucket may hold labels that were taken before.
    return [
        (f"labels.{key}", f"{value[:100]!r} has control or invisible characters; write plain text")
        for key, value in labels.items()
        if not value.isprintable()
    ]


def _rule_faults(averages: list[AverageRequest]) -> list[tuple[str, str]]:
    faults = []
    for number, average in enumerate(averages):
        try:
            parse_run_rule(average.rule)
        except InvalidInputError as error:
            faults.append((f"averages[{number}].rule", error.message))
    return faults
