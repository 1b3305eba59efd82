"""Describes the HTTP API to programs (/openapi.json) and to people (/docs), from the schemas that decode requests.

operations.py lists the endpoints, document.py makes the OpenAPI document, page.py shows it as one HTML page without
scripts, which needs no other server. Both are made once, at the first request.
"""

from __future__ import annotations

from functools import cache

import msgspec
from starlette.types import Receive, Scope, Send

from kvist.api_docs.document import openapi_document
from kvist.api_docs.page import docs_page
from kvist.http.asgi import JSON_TYPE, send_bytes
from kvist.server.app import MountedApi
from kvist.server.gateway import GatewayContext

_PAGE_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'"),
]


def docs_api(gateway: GatewayContext) -> MountedApi:
    del gateway

    @cache
    def document() -> bytes:
        return msgspec.json.encode(openapi_document())

    @cache
    def page() -> bytes:
        return docs_page(openapi_document()).encode()

    async def openapi(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send_bytes(send, document(), headers=[JSON_TYPE])

    async def docs(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send_bytes(send, page(), headers=_PAGE_HEADERS)

    routes = (("/openapi.json", openapi, ("GET",)), ("/docs", docs, ("GET",)))
    return MountedApi(routes=routes, paths_without_key=[path for path, _, _ in routes])
