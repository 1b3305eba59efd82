"""Reads what the record of a request needs (flight/) from its headers: its trace, and whether its response shows it."""

from __future__ import annotations

from starlette.types import Scope

from kvist.clock import unix_time_ns
from kvist.errors import RequestError, UnsupportedField
from kvist.flight.flight import Arrival
from kvist.flight.trace_context import trace_context
from kvist.http.asgi import header
from kvist.http.traffic import exchange_of

_TRACE_HEADER = "x-kvist-trace"
_TRACED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/generate"})  # of formats that show a record


def arrival_of(scope: Scope, *, response_id: str, model: str, now_s: float) -> Arrival:
    """Raises `RequestError` for an invalid header."""
    exchange = exchange_of(scope)
    return Arrival(
        request_id=exchange.request_id,
        response_id=response_id,
        endpoint=scope["path"],
        model=model,
        received_s=exchange.start_s,
        received_unix_s=round(unix_time_ns() / 1e9 - (now_s - exchange.start_s), 6),
        trace=trace_context(header(scope, b"traceparent"), header(scope, b"tracestate")),
        wants_trace=_wants_trace(scope),
    )


def _wants_trace(scope: Scope) -> bool:
    given = header(scope, _TRACE_HEADER.encode())
    if given not in (None, b"0", b"1"):
        shown = given[:32].decode("latin-1")
        raise RequestError(
            f"the header {_TRACE_HEADER} is {shown!r}; use 1 to see the stages of the request in its response, or "
            "omit the header",
            param=_TRACE_HEADER,
        )
    if given == b"1" and scope["path"] not in _TRACED_PATHS:
        raise UnsupportedField(
            f"responses of {scope['path']} do not show the stages of their request: omit the header {_TRACE_HEADER}, "
            "and read them at GET /requests/ID, where ID is the response's x-request-id",
            param=_TRACE_HEADER,
        )
    return given == b"1"
