"""A small HTTP/1.1 client for streams: one `asyncio.Protocol` a connection, httptools for the parsing, nothing else.

General clients take 100 µs or more for each piece of a body, which is the whole budget of 256 streams at 60 tokens a
second, and their pools look at all connections for each request, which takes 5 to 30 ms with 100 requests at once.
Here a piece goes from the socket to the caller in one call.

Connections are reused. A server may close an idle connection at any time, also while a request is on its way: if a
*reused* connection ends before any byte of the response, the request is sent once more on a new connection. Nothing
else is ever sent twice. Redirects, compression and HTTP/2 are not supported.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

MAX_IDLE_CONNECTIONS = 4096
CONNECT_TIMEOUT_S = 30.0
MAX_EVENT_BYTES = 16 << 20


class HttpFailure(Exception):
    """Raised when an exchange gave no complete response. Failures are counted by `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _ConnectionLost(HttpFailure):
    """Raised when the connection ended early. `any_byte`: a part of the response had arrived."""

    def __init__(self, message: str, *, any_byte: bool) -> None:
        super().__init__("cut" if any_byte else "dropped", message)
        self.any_byte = any_byte


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpReply:
    status: int
    retried: bool
    headers: Mapping[str, str]  # names in lower case


OnBody = Callable[[int, bytes], None]  # (status, piece of the body), called for each piece


class _Connection(asyncio.Protocol):
    """One socket. At most one exchange at a time; owned by the exchange or by the client's idle list."""

    def __init__(self) -> None:
        self.used = False
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[bool] | None = None  # the end of the exchange; True: the connection can be reused
        self._on_body: OnBody | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self.headers: dict[str, str] = {}  # of the last response
        self._any_byte = False
        self._framed = False  # the response has a length or is chunked; else it ends with the connection

    async def exchange(self, request: bytes, on_body: OnBody) -> int:
        """Return the status after the last piece. Raises `HttpFailure`, or an exception of `on_body`."""
        assert self._transport is not None
        assert self._done is None, "one exchange at a time"
        if not self.open:
            raise _ConnectionLost("the server had closed the connection", any_byte=False)
        self._done = asyncio.get_running_loop().create_future()
        self._on_body = on_body
        self._parser = httptools.HttpResponseParser(self)
        self._status, self._any_byte, self._framed, self.headers = 0, False, False, {}
        self._transport.write(request)
        try:
            keep = await self._done
        except BaseException:
            self.abort()
            raise
        finally:
            self._done = self._on_body = None
            self.used = True
        if not keep:
            self.abort()
        return self._status

    def abort(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------ asyncio's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class has the methods, not the type
        self.open = True

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            self.abort()  # unexpected bytes: the next response could not be distinguished from them
            return
        self._any_byte = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._fail(HttpFailure("bad_response", f"not an HTTP response: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._done is None or self._done.done():
            return
        if exc is None and self._status and not self._framed:
            self._done.set_result(False)
            return
        where = "in the middle of the response" if self._any_byte else "before the response"
        self._fail(
            _ConnectionLost(f"the connection ended {where}" + (f": {exc}" if exc else ""), any_byte=self._any_byte)
        )

    # ------------------------------------------------------------ the parser's calls

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.decode("latin-1").lower()
        self.headers[key] = value.decode("latin-1")
        if key in ("content-length", "transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # 1xx statuses only announce the response
            self._status = status

    def on_body(self, piece: bytes) -> None:
        assert self._on_body is not None
        self._on_body(self._status, piece)

    def on_message_complete(self) -> None:
        if self._status and self._done is not None and not self._done.done():
            self._done.set_result(self._parser.should_keep_alive() and self._framed)

    def _fail(self, error: BaseException) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class HttpClient:
    """Keeps idle connections to one server. Mutable; used by one event loop."""

    def __init__(self, base_url: str, *, api_key: str | None, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        url = urlsplit(base_url)
        assert url.hostname is not None, "checked with the settings"
        self._host, self._secure = url.hostname, url.scheme == "https"
        self._connect_timeout_s = connect_timeout_s
        self._port = url.port or (443 if self._secure else 80)
        self._root = url.path.rstrip("/").removesuffix("/v1")
        self._ssl = ssl.create_default_context() if self._secure else None
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._common = f"Host: {url.netloc.rpartition('@')[2]}\r\nAccept: */*\r\n{key}".encode()
        self._idle: list[_Connection] = []
        self.num_connections = 0  # opened so far
        self.num_retries = 0

    async def get(self, path: str, on_body: OnBody) -> HttpReply:
        return await self.request("GET", path, b"", on_body)

    async def post(self, path: str, body: bytes, on_body: OnBody) -> HttpReply:
        return await self.request("POST", path, body, on_body)

    async def request(self, method: str, path: str, body: bytes, on_body: OnBody) -> HttpReply:
        """Send JSON, or nothing. Raises `HttpFailure` without a complete response; any status is a response."""
        head = f"{method} {self._root}{path} HTTP/1.1\r\n".encode() + self._common
        if body or method == "POST":
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        return await self._send(head + b"\r\n" + body, on_body)

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _send(self, request: bytes, on_body: OnBody) -> HttpReply:
        connection = self._take_idle() or await self._connect()
        reused = connection.used
        retried = False
        try:
            status = await connection.exchange(request, on_body)
        except _ConnectionLost as error:
            if not reused or error.any_byte:
                raise
            self.num_retries += 1
            retried = True
            connection = await self._connect()
            status = await connection.exchange(request, on_body)
        if connection.open and len(self._idle) < MAX_IDLE_CONNECTIONS:
            self._idle.append(connection)
        return HttpReply(status=status, retried=retried, headers=connection.headers)

    def _take_idle(self) -> _Connection | None:
        """Return the most recently used connection, the most likely to be still open."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        except TimeoutError as error:
            message = f"no connection to {self._host}:{self._port} in {self._connect_timeout_s:g} s"
            raise HttpFailure("connect", message) from error
        except OSError as error:
            raise HttpFailure("connect", f"cannot connect to {self._host}:{self._port}: {error}") from error
        self.num_connections += 1
        return connection


async def read_whole(client: HttpClient, path: str, *, timeout_s: float) -> tuple[int, bytes]:
    """GET a small body; return status and body. Raises `HttpFailure`."""
    pieces: list[bytes] = []
    try:
        async with asyncio.timeout(timeout_s):
            reply = await client.get(path, lambda _status, piece: pieces.append(piece))
    except TimeoutError as error:
        raise HttpFailure("timeout", f"GET {path} took longer than {timeout_s:g} s") from error
    return reply.status, b"".join(pieces)


class EventLines:
    """Parses server-sent events from the pieces of a body, which the network may cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = b""
        self._lines: list[bytes] = []

    def feed(self, piece: bytes) -> list[tuple[bytes, bytes]]:
        """Return the events completed by `piece`, as (name or b"", content). Raises `HttpFailure` above the limit."""
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) + sum(map(len, self._lines)) > MAX_EVENT_BYTES:
            raise HttpFailure("bad_stream", f"one event is longer than {MAX_EVENT_BYTES} bytes")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
            elif not line:
                if self._lines:
                    found.append((self._name, b"\n".join(self._lines)))
                self._name, self._lines = b"", []
            elif line.startswith(b"event:"):
                self._name = line[6:].strip()
        return found
