"""Shows where the time of requests went.

    GET /requests         endpoints.py    the requests under way and the last ones that ended, each with its stages
    GET /requests/{id}
    OpenTelemetry spans   spans.py        with --otlp-traces-endpoint

flight/ makes the records; `tracing_api` mounts the endpoints on a gateway (server/app.py).
"""

from __future__ import annotations

from kvist.server.app import MountedApi
from kvist.server.gateway import GatewayContext
from kvist.tracing.endpoints import Requests

__all__ = ["tracing_api"]


def tracing_api(gateway: GatewayContext) -> MountedApi:
    requests = Requests(gateway)
    return MountedApi(
        routes=[("/requests", requests.all, ["GET"]), ("/requests/{request:path}", requests.one, ["GET"])]
    )
