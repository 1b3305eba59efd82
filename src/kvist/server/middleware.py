"""The layers around the routes of every HTTP server of Kvist: request ids, log and counts; checks; errors.

    TrafficMiddleware (request id, access log, counts) → GuardMiddleware (Host, API key, Origin, Content-Type, errors)
      → routes

`GuardMiddleware` turns every KvistError that no endpoint handled into its status and body, in OpenAI's shape unless the
API of the path has another. A client that has disconnected gets no response.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence

from starlette.exceptions import HTTPException
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.errors import EngineError, KvistError, RequestError
from kvist.http.asgi import ClientDisconnected, header, send_error
from kvist.http.caller import ApiKeys
from kvist.http.traffic import Traffic, exchange_of
from kvist.server.config import ServerConfig
from kvist.server.lifecycle import Lifecycle
from kvist.server.web_pages import OriginGuard, check_host_header

logger = logging.getLogger(__name__)

_PATHS_WITHOUT_KEY = frozenset({"/", "/health", "/ready"})  # probes carry no key; / says whether a key is needed
_MAX_REQUEST_ID_CHARS = 128
Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]
ErrorBody = Callable[[KvistError, str], object]  # error, request id → the body of the response
Background = Callable[[], Coroutine[None, None, None]]


class RawEndpoint:
    """Wraps an endpoint in an object: Starlette treats a plain function as a request handler, not as an ASGI app."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


class TrafficMiddleware:
    """The outermost layer: logs and counts every request, and gives every response its request id."""

    def __init__(self, inner: ASGIApp, traffic: Traffic, *, background: Sequence[Background] = ()) -> None:
        """`background` runs while the server accepts connections."""
        self.traffic = traffic
        self.background = background
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})  # reject before accepting
        else:
            await self._inner(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(scope)
        exchange = self.traffic.begin(scope, request_id.decode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        try:
            await self._inner(scope, receive, send_with_id)
        except ClientDisconnected:
            logger.debug("client disconnected: %s %s", scope["method"], scope["path"])
        finally:
            self.traffic.end(scope, exchange)


class GuardMiddleware:
    """Checks a request before the routes see it, and turns an error into its response."""

    def __init__(
        self,
        router: Router,
        config: ServerConfig,
        lifecycle: Lifecycle,
        error_bodies: Mapping[str, ErrorBody] | None = None,
        *,
        paths_without_key: Iterable[str] = (),
    ) -> None:
        """`error_bodies`: the shape of errors, by prefix of the path; elsewhere errors have OpenAI's shape."""
        self._paths_without_key = _PATHS_WITHOUT_KEY.union(paths_without_key)
        self._router = router
        self._lifecycle = lifecycle
        self._keys = ApiKeys(config.api_key, config.api_key_weights)
        self._pages = OriginGuard(config)
        self._error_bodies = error_bodies or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # makes the router raise for an unknown path instead of sending its own error body
        try:
            if scope["type"] == "http":
                self._check(scope)
            await self._router(scope, receive, send)
        except ClientDisconnected:
            raise
        except asyncio.CancelledError:
            if not self._lifecycle.stopping:
                raise
            logger.warning(
                "stopping: the client of %s %s did not read its response in time", scope["method"], scope["path"]
            )
        except Exception as error:
            known = _known(error)
            if known is None:
                logger.exception("bug while answering %s %s", scope["method"], scope["path"])
                known = EngineError("internal error in this server; see its log")
            if exchange_of(scope).status is not None:
                raise  # the status has been sent: uvicorn closes the connection
            await send_error(send, known, body=self._body(scope, known), more_headers=_allowed_methods(error))

    def _body(self, scope: Scope, error: KvistError) -> object:
        for prefix, body in self._error_bodies.items():
            if scope["path"].startswith(prefix):
                return body(error, exchange_of(scope).request_id)
        return None

    def _check(self, scope: Scope) -> None:
        check_host_header(scope)
        if scope["path"] not in self._paths_without_key:
            self._keys.authenticate(scope)
            self._pages.check(scope)


def _known(error: Exception) -> KvistError | None:
    if isinstance(error, KvistError):
        return error
    if isinstance(error, HTTPException):
        messages = {404: "unknown path", 405: "this path does not support that method"}
        refusal = RequestError(messages.get(error.status_code, error.detail))
        refusal.http_status = error.status_code
        return refusal
    return None


def _allowed_methods(error: Exception) -> list[tuple[bytes, bytes]]:
    """Return the Allow header, which HTTP requires of a 405."""
    allow = (error.headers or {}).get("Allow") if isinstance(error, HTTPException) else None
    return [] if allow is None else [(b"allow", allow.encode())]


def _request_id(scope: Scope) -> bytes:
    """Return the client's own id when that is safe to send back, else a new id."""
    given = header(scope, b"x-request-id")
    if given and len(given) <= _MAX_REQUEST_ID_CHARS and all(0x21 <= byte < 0x7F for byte in given):
        return given
    return uuid.uuid4().hex.encode()
