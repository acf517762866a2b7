"""Python client of the REST API: `Client` and `AsyncClient`, and the errors that they raise."""

from services.client.asynchronous import AsyncClient
from services.client.errors import ApiError, ServiceUnreachableError
from services.client.service import Client

__all__ = ["ApiError", "AsyncClient", "Client", "ServiceUnreachableError"]
