"""What routes are given, and the answers that all of them may give."""

from typing import Annotated, Any

from fastapi import Depends, Request

from services.api.catalog import Catalog
from services.api.problems import MEDIA_TYPE
from services.api.schemas import Problem


def catalog_of(request: Request) -> Catalog:
    """The application's catalogue."""
    catalog: Catalog = request.app.state.catalog
    return catalog


CatalogDep = Annotated[Catalog, Depends(catalog_of)]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem answers of a route, for its description; 401, 429 and 503 go without saying."""
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    content = {MEDIA_TYPE: {"schema": schema}}
    return {status: {"description": "problem", "content": content} for status in (401, *statuses, 429, 503)}
