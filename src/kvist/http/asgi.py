"""Raw-ASGI helpers: read a bounded body, send JSON, convert an error to OpenAI's shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from kvist.errors import KvistError, RequestError
from kvist.http.encoding import BodyLimits, body_decoder
from kvist.http.work import BodyShare

Headers = Sequence[tuple[bytes, bytes]]

_DEFAULT_RETRY_AFTER_S = 1.0
_MAX_ERROR_CHARS = 2000
_MAX_NAME_CHARS = 64  # of a parameter, in a message
_MAX_LENGTH_DIGITS = 18  # of Content-Length; more digits than any limit has
JSON_TYPE = (b"content-type", b"application/json")


class ClientDisconnected(Exception):
    """The client closed the connection before the response was complete; nothing more can be sent."""


def header(scope: Scope, name: bytes) -> bytes | None:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return next((value for key, value in headers if key == name), None)


def query_of(scope: Scope, *known: str) -> dict[str, str]:
    """Return the parameters of the query. Raise `RequestError` for one that is not `known`, or is given twice."""
    query: bytes = scope["query_string"]
    given: dict[str, str] = {}
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        shown = name[:_MAX_NAME_CHARS]
        if name not in known:
            raise RequestError(f"{scope['path']} takes {', '.join(known)}, not `{shown}`", param=shown)
        if name in given:
            raise RequestError(f"`{shown}` is given twice: give it once", param=shown)
        given[name] = value
    return given


async def read_body(scope: Scope, receive: Receive, share: BodyShare, limits: BodyLimits) -> bytes:
    """Read the whole body and decompress it.

    Raises `BodyTooLarge` as soon as the body is known to exceed the limit, `Overloaded` when the server already
    holds too many bytes of bodies, `ClientDisconnected` when the body breaks off, `SlowBody` when the body does not
    arrive in time, and `UnsupportedMediaType` for a content coding that the server does not read."""
    decode = body_decoder(header(scope, b"content-encoding"), share, limits)
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit():
        if len(declared) > _MAX_LENGTH_DIGITS or int(declared) > limits.max_bytes:
            raise limits.too_large()
        share.reserve_up_to(int(declared))  # all of it now, so that bodies in progress can finish
    try:
        async with asyncio.timeout(limits.timeout_s):
            body = await _collect_body(receive, share, limits)
    except TimeoutError as error:
        raise limits.too_slow() from error
    return body if decode is None else await decode(body)


async def _collect_body(receive: Receive, share: BodyShare, limits: BodyLimits) -> bytes:
    pieces, num_bytes = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        piece: bytes = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes > limits.max_bytes:
            raise limits.too_large()
        share.reserve_up_to(num_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


async def send_bytes(send: Send, body: bytes, *, status: int = 200, headers: Headers = (JSON_TYPE,)) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: object, *, status: int = 200, headers: Headers = ()) -> None:
    await send_bytes(send, msgspec.json.encode(value), status=status, headers=[JSON_TYPE, *headers])


def error_object(error: KvistError) -> dict[str, object]:
    """Return the error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""
    kind = "invalid_request_error" if isinstance(error, RequestError) else error.code
    message, param = shown_error(error)
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def shown_error(error: KvistError) -> tuple[str, str | None]:
    """Return the message and `param`, shortened."""
    return _cut(error.message), None if error.param is None else _cut(error.param)


def _cut(text: str) -> str:
    """Shorten `text`: errors quote values of the request, which may have millions of characters."""
    return text if len(text) <= _MAX_ERROR_CHARS else f"{text[:_MAX_ERROR_CHARS]}…"


def error_headers(error: KvistError) -> list[tuple[bytes, bytes]]:
    headers = []
    if error.retryable or error.retry_after_s is not None:
        retry_after_s = _DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers.append((b"retry-after", str(max(1, round(retry_after_s))).encode()))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


async def send_error(send: Send, error: KvistError, *, body: object = None, more_headers: Headers = ()) -> None:
    """`body`: the error in the shape of its API; None: in OpenAI's shape."""
    headers = [*more_headers, *error_headers(error)]
    await send_json(send, error_object(error) if body is None else body, status=error.http_status, headers=headers)


def error_event(error: KvistError) -> bytes:
    """Return the event that ends a stream after an error, in OpenAI's shape."""
    return b"event: error\ndata: " + msgspec.json.encode(error_object(error)) + b"\n\n"


@asynccontextmanager
async def cancel_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the body of the `async with` when the client disconnects, and raise `ClientDisconnected` instead."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:  # otherwise an outer scope has cancelled the task as well
            raise ClientDisconnected from None
        raise
    finally:
        watcher.cancel()
