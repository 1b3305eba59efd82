"""The trace context of a request's headers (W3C Trace Context, level 1), checked and bounded.

A header that breaks the standard's form is ignored, as the standard asks: the request then begins a trace of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_TRACEPARENT_BYTES = 128  # version 00 has 55; later versions may add fields
MAX_TRACESTATE_BYTES = 512

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE = re.compile(rb"[\x20-\x7e]*")
_INVALID_VERSION, _FIRST_VERSION = b"ff", b"00"
_SAMPLED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContext:
    trace_id: str  # 32 hexadecimal digits
    parent_id: str  # 16 hexadecimal digits: the caller's span
    is_sampled: bool
    state: str = ""  # of other tracing systems, passed on as it is


def trace_context(traceparent: bytes | None, tracestate: bytes | None = None) -> TraceContext | None:
    """Return the context that the headers name; None if there is none, or the header is not valid."""
    if traceparent is None or len(traceparent) > MAX_TRACEPARENT_BYTES:
        return None
    found = _PARENT.fullmatch(traceparent)
    if found is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == _INVALID_VERSION or (version == _FIRST_VERSION and more is not None):
        return None
    if not trace_id.strip(b"0") or not parent_id.strip(b"0"):
        return None
    state = tracestate or b""
    if len(state) > MAX_TRACESTATE_BYTES or not _STATE.fullmatch(state):
        state = b""
    return TraceContext(
        trace_id=trace_id.decode(),
        parent_id=parent_id.decode(),
        is_sampled=bool(int(flags, 16) & _SAMPLED),
        state=state.decode(),
    )
