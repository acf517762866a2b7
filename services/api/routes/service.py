"""The service itself: whether it lives, is ready, its version, description and metrics."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.api.access.auth import public
from wa_core.records import FORMAT

router = APIRouter(tags=["service"])

VERSION = version("weight-averaging")


@router.get("/livez")
@public
async def livez() -> dict[str, str]:
    """Say that the process lives, whatever the store does."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "not ready; `checks` says why"}})
@public
def readyz(request: Request) -> dict[str, Any]:
    """Say whether the store keeps its promises and answers now."""
    return {"status": "ok", "checks": request.app.state.readiness.check()}


@router.get("/version")
@public
async def show_version() -> dict[str, Any]:
    """The service's version, and that of the bucket's format."""
    return {"version": VERSION, "format": FORMAT}


@router.get("/metrics", response_class=Response)
@public
def metrics(request: Request) -> Response:
    """Prometheus metrics of this replica."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json", include_in_schema=False)
def openapi(request: Request) -> dict[str, Any]:
    """The OpenAPI description of every route."""
    description: dict[str, Any] = request.app.openapi()
    return description
