"""Python client of the REST API: `Client`, and the errors that it raises."""

from services.client.errors import ApiError, ServiceUnreachableError
from services.client.service import Client

__all__ = ["ApiError", "Client", "ServiceUnreachableError"]
