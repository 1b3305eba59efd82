"""Records requests that generate: where their time goes (flight/).

A request is recorded from the moment it has a prompt; a request that is refused before has none of the stages below.

    received → tokenised → (grammar) → the dispatcher's stages (flight/timeline.py) → detokenised → sent
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.types import Scope

from kvist.clock import unix_time_ns
from kvist.errors import EngineError, KvistError, RequestError, UnsupportedField
from kvist.flight.flight import Arrival, Flight, Progress
from kvist.flight.records import CachedTokens
from kvist.flight.stages import RECEIVED, SENT, TOKENISED
from kvist.flight.trace_context import trace_context
from kvist.http.asgi import ClientDisconnected, header
from kvist.http.traffic import exchange_of
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState

TRACE_HEADER = "x-kvist-trace"
_TRACED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/generate"})  # of formats that show a record


@contextmanager
def recorded(gateway: GatewayContext, choices: Sequence[ChoiceState], scope: Scope) -> Iterator[None]:
    """Record the request of these choices until the end of the block. Raises `RequestError` for an invalid header."""
    wants_trace = _wants_trace(scope)
    if not gateway.flights.is_on and not wants_trace:
        yield
        return
    flight = _flight(gateway, choices, scope, wants_trace=wants_trace)
    gateway.flights.begin(flight)
    for choice in choices:
        choice.flight = flight
    try:
        yield
    except (ClientDisconnected, asyncio.CancelledError):
        raise
    except Exception as error:
        flight.error_code = error.code if isinstance(error, KvistError) else EngineError.code
        raise
    finally:
        flight.reached(SENT)
        gateway.flights.end(flight)


def _flight(gateway: GatewayContext, choices: Sequence[ChoiceState], scope: Scope, *, wants_trace: bool) -> Flight:
    exchange, clock = exchange_of(scope), gateway.clock
    now_s = clock.now_s()
    arrival = Arrival(
        request_id=exchange.request_id,
        response_id=choices[0].request.request_id.rpartition("-")[0],
        endpoint=scope["path"],
        model=gateway.model_name,
        received_s=exchange.start_s,
        received_unix_s=round(unix_time_ns() / 1e9 - (now_s - exchange.start_s), 6),
        trace=trace_context(header(scope, b"traceparent"), header(scope, b"tracestate")),
        wants_trace=wants_trace,
    )
    flight = Flight(arrival, clock, lambda: progress_of(choices), len(choices))
    if exchange.body_read_s is not None:
        flight.reached(RECEIVED, exchange.body_read_s)
    flight.reached(TOKENISED, now_s)
    return flight


def progress_of(choices: Sequence[ChoiceState]) -> Progress:
    first = [choice for choice in choices if not choice.repeats_prompt]
    cached = {tier: sum(choice.cached_by_tier[tier] for choice in first) for tier in first[0].cached_by_tier}
    workers = (worker for choice in choices for worker in (choice.prefill_worker, choice.decode_worker))
    times_s = [choice.first_token_s for choice in choices if choice.first_token_s is not None]
    return Progress(
        prompt_tokens=sum(choice.request.num_prompt_tokens for choice in first),
        cached_tokens=CachedTokens(**cached),
        completion_tokens=sum(len(choice.token_ids) for choice in choices),
        first_token_s=min(times_s, default=None),
        finish_reason=choices[0].finish_reason,
        is_complete=all(choice.finish_reason is not None for choice in choices),
        workers=tuple(dict.fromkeys(worker for worker in workers if worker is not None)),
    )


def _wants_trace(scope: Scope) -> bool:
    given = header(scope, TRACE_HEADER.encode())
    if given not in (None, b"0", b"1"):
        raise RequestError(
            f"the header {TRACE_HEADER} is {given[:32]!r}; 1 asks for the stages of the request in its response",
            param=TRACE_HEADER,
        )
    if given == b"1" and scope["path"] not in _TRACED_PATHS:
        raise UnsupportedField(
            f"responses of {scope['path']} do not show the stages of their request: omit the header {TRACE_HEADER}, "
            "and read them at GET /requests/ID, where ID is the response's x-request-id",
            param=TRACE_HEADER,
        )
    return given == b"1"
