"""The service from Python; needs neither torch nor an index."""

from service.client.client import AsyncClient, Client
from service.client.connection import (
    Connection,
    ServiceError,
    ServiceProblem,
    ServiceUnreachable,
)

__all__ = [
    "AsyncClient",
    "Client",
    "Connection",
    "ServiceError",
    "ServiceProblem",
    "ServiceUnreachable",
]
