"""The pages: the run list at `/`, a run at `/runs/{id}`, and the part of it that is fetched again as it changes.

Whoever asks for anything but HTML gets problems, as everywhere; a browser gets a page that says the same.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from services.api.access.auth import is_signed_in, public
from services.api.answers.history import History
from services.api.dashboard.listing import MAX_TEXT, Filters, rows
from services.api.dashboard.refusals import PageRoute, sign_in_page
from services.api.dashboard.rendering import digest, is_part_wanted, page
from services.api.dashboard.run_page import run_page
from services.api.routes.dependencies import CatalogDep
from services.api.routes.insight import history_of
from wa_core import layout
from wa_core.records import RunState

HistoryDep = Annotated[History, Depends(history_of)]
_Text = Annotated[str, Query(max_length=MAX_TEXT)]


router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/", response_class=Response)
@public
def list_runs(
    request: Request,
    catalog: CatalogDep,
    is_admitted: Annotated[bool, Depends(is_signed_in)],
    state: _Text = "",
    label: _Text = "",
    q: _Text = "",
    after: Annotated[str, Query(max_length=26)] = "",
    seen: Annotated[str, Query(max_length=16)] = "",
) -> Response:
    """The run list; for htmx its rows alone, and nothing while they are as `seen`.

    The start is for everybody: who is not signed in is asked to.
    """
    if not is_admitted:
        return sign_in_page(request)
    filters = Filters(state=state, label=label.strip(), text=q)
    found, following = rows(catalog, filters, after=after if layout.is_run_id(after) else None)
    shown = digest(found, filters, after)
    if is_part_wanted(request) and seen == shown:
        return Response(status_code=204)
    template = "_runs.html" if is_part_wanted(request) else "runs.html"
    return page(
        template,
        request=request,
        headers={"Vary": "HX-Request"},
        rows=found,
        following=following,
        filters=filters,
        after=after,
        states=[state.value for state in RunState],
        digest=shown,
    )


@router.get("/runs/{run_id}", response_class=Response)
def show_run(
    request: Request,
    run_id: str,
    catalog: CatalogDep,
    history: HistoryDep,
    average: Annotated[str | None, Query()] = None,
) -> Response:
    """A run's page."""
    return page("run.html", request=request, view=run_page(catalog, history, run_id, name=average))


@router.get("/runs/{run_id}/live", response_class=Response)
def refresh_run(
    request: Request,
    run_id: str,
    catalog: CatalogDep,
    history: HistoryDep,
    average: Annotated[str | None, Query()] = None,
    seen: Annotated[str, Query(max_length=16)] = "",
) -> Response:
    """What changes on a run's page; nothing while it is as `seen`."""
    view = run_page(catalog, history, run_id, name=average)
    if seen == view.digest:
        return Response(status_code=204)
    return page("_live.html", request=request, view=view)
