"""What a run's webhooks were told, and what they answered."""

from typing import Annotated

from fastapi import APIRouter, Query

from services.api.answers.deliveries import delivery_page
from services.api.routes.dependencies import CatalogDep, problems
from services.api.schemas import DeliveryResource, Page

router = APIRouter(prefix="/v1/runs/{run_id}/deliveries", tags=["feeds"])

MAX_PAGE = 200


@router.get("", responses=problems(404, 422))
def list_deliveries(
    run_id: str,
    catalog: CatalogDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[str, Query(pattern="^[a-z0-9-]{0,100}$", description="the `next` of the page before")] = "",
) -> Page[DeliveryResource]:
    """List the messages to a run's webhooks: delivered, given up, or pending."""
    return delivery_page(catalog, run_id, after=after, limit=limit)
