"""uvicorn's HTTP protocol, with bounds on input that arrives before the application sees a request.

    connected ──first byte──► header ──complete──► request (app.py) ──answered──► idle ──first byte──► header ...
        │ too many: 503         │ too large: 431        │ body never complete: closed
        └ silent: closed        └ too slow: 408, malformed: 400

httptools buffers an unfinished line however long it grows, in a header, a trailer or a chunk extension. The protocol
therefore counts and limits the bytes that the parser consumes without an event. When the server closes a connection
before its client has sent everything, the protocol keeps reading for a moment and drops the input (a lingering close):
closing at once would reset the connection, and the client could lose the response.

HTTP/1.0 has no chunked coding: there the end of the connection ends a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import httptools
import msgspec
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from kvist.errors import HeaderTooLarge, KvistError, RequestError, SlowHeader, Unavailable
from kvist.http.asgi import JSON_TYPE, Headers, error_headers, error_object, header
from kvist.http.traffic import Traffic

MAX_HEADER_BYTES = 64 << 10
MAX_HEADER_LINES = 100
_MAX_PIPELINED = 16  # requests that may wait for an earlier request on the same connection
_PIECE_BYTES = 64 << 10  # fed to the parser at once
_MAX_UNREAD_BYTES = 64 << 10  # a shorter body that was answered unread may arrive later on the kept-alive connection
_LINGER_S = 1.0  # how long a client that has its response may keep sending
_UNREAD_S = 5.0  # how long the last bytes of a response that broke off wait for a client that does not read
_MAX_LINGERING = 64  # connections over the limit that get a lingering close
RETIRING_KEEP_ALIVE_S = 3  # of an idle connection, while another process accepts new ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    max_connections: int
    header_timeout_s: float


def bounded_protocol(bounds: Bounds, traffic: Traffic) -> Callable[..., asyncio.Protocol]:
    """Return the factory that uvicorn calls for each connection."""

    def make(*args: Any, **kwargs: Any) -> asyncio.Protocol:
        return BoundedProtocol(bounds, traffic, *args, **kwargs)

    return make


class _GracefulTransport:
    """The transport that uvicorn's response cycle sees: its `close` may linger (`Connection: close`)."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class BoundedProtocol(HttpToolsProtocol):
    def __init__(self, bounds: Bounds, traffic: Traffic, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._traffic = traffic
        self._error: KvistError | None = None  # raised through the parser, which discards it
        self._ignores_input = False  # input is dropped
        self._is_closing = False  # nothing more is sent
        self._in_header = False
        self._has_progress = False  # the parser has reported an event in this piece
        self._num_silent_bytes = 0  # consumed since the last event
        self._num_header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._is_retiring = False  # the next response is the last one on this connection

    # ---------------------------------------------------------------- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._bounds.max_connections:
            error = Unavailable(
                f"{self._bounds.max_connections} connections are open, which is the limit (--max-connections)"
            )
            self._ignores_input = True
            self._traffic.connection_refused(self.client, error.message)
            transport.write(_response(error))
            if len(self.connections) > self._bounds.max_connections + _MAX_LINGERING:
                transport.close()
            else:
                self._close_lingering()
            return
        self._time_header()

    def retire(self) -> None:
        """Announce the end of the connection with the next response (`Connection: close`), and wait less for it."""
        self._is_retiring, self.timeout_keep_alive = True, RETIRING_KEEP_ALIVE_S
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = self.loop.call_later(RETIRING_KEEP_ALIVE_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ignores_input:
            return
        for start in range(0, len(data), _PIECE_BYTES):
            self._feed(data[start : start + _PIECE_BYTES])
            if self._ignores_input:
                return

    def _feed(self, piece: bytes) -> None:
        self._has_progress = False
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:  # unsupported protocol: answer the plain request
            self._ignores_input = True
        except httptools.HttpParserError:
            self._refuse(self._error or RequestError("the request is not valid HTTP/1.1"))
        else:
            self._num_silent_bytes = 0 if self._has_progress else self._num_silent_bytes + len(piece)
            if self._num_silent_bytes > MAX_HEADER_BYTES:
                self._refuse(_too_large())

    # ---------------------------------------------------------------- events of the parser

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()  # not earlier: an empty line does not begin a request
        super().on_message_begin()
        self._in_header, self._num_header_bytes = True, 0
        self._has_progress = True
        if self._header_timer is None:
            self._time_header()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:  # trailers too
        super().on_header(name, value)
        self._count_header(len(name) + len(value) + len(": \r\n"))

    def on_headers_complete(self) -> None:
        self._has_progress = True
        self._stop_header_timer()
        self._unset_keepalive_if_required()  # the previous response may have set it after this request began
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._fail(RequestError(f"more than {_MAX_PIPELINED} requests wait on this connection"))
        super().on_headers_complete()
        self._in_header = False
        if self.parser.should_upgrade() or self._is_retiring:
            self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        self._has_progress = True

    def on_body(self, body: bytes) -> None:
        self._has_progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_progress = True
        super().on_message_complete()

    def _count_header(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADER_LINES:
            self._fail(_too_large())

    def _fail(self, error: KvistError) -> None:
        self._error = error
        raise error

    # ---------------------------------------------------------------- answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.transport = cast(asyncio.Transport, _GracefulTransport(self.transport, self._close_after_response))
        super()._start_asgi_task(cycle, app if cycle.scope["http_version"] != "1.0" else _until_close(app, cycle))

    def _close_after_response(self) -> None:
        if self.cycle.more_body or self._ignores_input:
            self._close_lingering()
        else:
            self.transport.close()
            if not self.cycle.response_complete:  # broken off, perhaps because the client reads nothing
                self.loop.call_later(_UNREAD_S, self.transport.abort)

    def on_response_complete(self) -> None:
        if self._is_closing:
            self.server_state.total_requests += 1
            return
        is_last = not self.pipeline  # otherwise the next request starts now and becomes `self.cycle`
        super().on_response_complete()
        if is_last and self.cycle.more_body and not self.transport.is_closing():
            length = header(cast(Scope, self.scope), b"content-length")
            if length is None or int(length) > _MAX_UNREAD_BYTES:
                self._close_lingering()  # answered before the body arrived: drop the rest of the body

    def _refuse(self, error: KvistError) -> None:
        """Send an error and close a connection whose input cannot be parsed. A response in progress is finished
        first."""
        self._ignores_input = True
        self._stop_header_timer()
        self._traffic.refused(error.http_status, self.client, error.message)
        if self.pipeline:
            self.transport.close()
            return
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way and (self._in_header or self.cycle.response_started):
            self.cycle.keep_alive = False
            return
        if under_way:  # the body of this request is malformed
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write(_response(error))
        self._close_lingering()

    def _close_lingering(self) -> None:
        self._ignores_input = self._is_closing = True
        self.flow.resume_reading()
        self._unset_keepalive_if_required()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    # ---------------------------------------------------------------- time

    def _time_header(self) -> None:
        self._header_timer = self.loop.call_later(self._bounds.header_timeout_s, self._header_is_late)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _header_is_late(self) -> None:
        self._header_timer = None
        if self._in_header:
            limit_s = self._bounds.header_timeout_s
            self._refuse(SlowHeader(f"the request header did not arrive within {limit_s:g} s (--header-timeout-s)"))
        else:  # idle: no byte has arrived
            self.transport.close()


def _too_large() -> HeaderTooLarge:
    return HeaderTooLarge(
        f"the request header is over the limit of {MAX_HEADER_BYTES} bytes or {MAX_HEADER_LINES} lines"
    )


def _response(error: KvistError) -> bytes:
    body = msgspec.json.encode(error_object(error))
    headers: Headers = [
        JSON_TYPE,
        *error_headers(error),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    return _head(error.http_status, headers) + body


def _head(status: int, headers: Headers) -> bytes:
    return STATUS_LINE[status] + b"".join(name + b": " + value + b"\r\n" for name, value in headers) + b"\r\n"


def _until_close(app: Any, cycle: RequestResponseCycle) -> Any:
    """Wrap `app` for an HTTP/1.0 request: a response of unknown length is sent unchunked, and its end closes the
    connection."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_raw = False

        async def send_raw(message: Message) -> None:
            nonlocal is_raw
            if message["type"] == "http.response.start":
                headers: Headers = [*cycle.default_headers, *message["headers"]]
                is_raw = scope["method"] != "HEAD" and all(name != b"content-length" for name, _ in headers)
                if is_raw and not cycle.disconnected:
                    cycle.response_started = True
                    cycle.transport.write(_head(message["status"], [*headers, (b"connection", b"close")]))
            if not is_raw:
                await send(message)
            elif message["type"] == "http.response.body":
                await _send_piece(cycle, message)

        await app(scope, receive, send_raw)

    return answer


async def _send_piece(cycle: RequestResponseCycle, message: Message) -> None:
    if cycle.flow.write_paused and not cycle.disconnected:
        await cycle.flow.drain()
    if cycle.disconnected:
        return
    cycle.transport.write(message.get("body", b""))
    if not message.get("more_body", False):
        cycle.response_complete = True
        cycle.message_event.set()
        cycle.transport.close()
        cycle.on_response()
