"""Take user code, for runs to name."""

from typing import Annotated

from fastapi import APIRouter, Depends

from services.api.access.auth import CODE, scope
from services.api.asked.body import read_package
from services.api.problems import HttpProblem
from services.api.routes.dependencies import CatalogDep, problems
from services.api.schemas import PackageResource
from wa_core.catalog.packages import put_package
from wa_core.errors import InvalidInputError
from wa_core.packages import check_package

router = APIRouter(prefix="/v1", tags=["packages"])


@router.post(
    "/packages",
    status_code=201,
    responses=problems(400, 403, 408, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                kind: {"schema": {"type": "string", "format": "binary"}}
                for kind in ("application/zip", "application/octet-stream")
            },
        }
    },
)
@scope(CODE)
def upload_package(body: Annotated[bytes, Depends(read_package)], catalog: CatalogDep) -> PackageResource:
    """Keep a zip of Python code under its digest. Nothing in it is run until a run that names it is trained."""
    try:
        contents = check_package(body)
    except InvalidInputError as error:
        raise HttpProblem(error.message, status=422, code=error.code) from None
    package = put_package(catalog.store, body)
    return PackageResource(
        package=package,
        size_bytes=len(body),
        unpacked_bytes=contents.unpacked_bytes,
        num_files=len(contents.sizes),
        modules=contents.modules,
    )
