"""Make, list and revoke tokens."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from services.api.access.auth import ADMIN, scope
from services.api.asked.body import read_token_request
from services.api.problems import HttpProblem
from services.api.routes.dependencies import CatalogDep, problems
from services.api.schemas import Listing, NewToken, TokenResource
from wa_core.catalog import tokens
from wa_core.records import TokenRecord, TokenRequest

router = APIRouter(prefix="/v1/tokens", tags=["tokens"])


@router.post(
    "",
    status_code=201,
    responses=problems(400, 403, 408, 409, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TokenRequest"}}},
        }
    },
)
@scope(ADMIN)
def create_token(
    wanted: Annotated[TokenRequest, Depends(read_token_request)],
    request: Request,
    response: Response,
    catalog: CatalogDep,
) -> NewToken:
    """Make a token. Its `secret` is in this answer and nowhere else."""
    if request.app.state.tokens.is_open:
        # Whoever comes by could make one, and would keep it when the service is closed one day.
        raise HttpProblem(
            "this service asks nobody for a token; start it with WA_TOKEN, and make others with that one",
            status=409,
            code="service_is_open",
        )
    secret, record = tokens.create_token(catalog.store, wanted, clock=request.app.state.clock)
    response.headers["Cache-Control"] = "no-store"
    response.headers["Location"] = f"/v1/tokens/{record.token_id}"
    return NewToken(**dict(_resource(record)), secret=secret)


@router.get("", responses=problems(403))
@scope(ADMIN)
def list_tokens(catalog: CatalogDep) -> Listing[TokenResource]:
    """List the tokens that were made and not revoked, oldest first; never their secrets."""
    return Listing(data=[_resource(record) for record in tokens.list_tokens(catalog.store)])


@router.delete("/{token_id}", status_code=204, response_class=Response, responses=problems(403, 404, 422))
@scope(ADMIN)
def revoke_token(
    token_id: Annotated[str, Path(pattern="^[0-9a-f]{16}$")], request: Request, catalog: CatalogDep
) -> None:
    """Revoke a token. Every replica refuses it within 5 seconds, and for good."""
    tokens.revoke_token(catalog.store, token_id, clock=request.app.state.clock)
    request.app.state.token_book.forget(token_id)


def _resource(record: TokenRecord) -> TokenResource:
    return TokenResource(
        token_id=record.token_id,
        name=record.name,
        prefix=f"wa_{record.token_id}",
        last_four=record.last_four,
        scopes=list(record.scopes),
        created_at=record.created_at,
        expires_at=record.expires_at,
    )
