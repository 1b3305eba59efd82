"""Runs a job and writes its response, streamed (server-sent events) or whole.

Life of a job: reserve places (admission.py) → run the choices → the first delta decides the status: an error before it
is an ordinary HTTP error, an error after it is an `error` event → events, one ASGI send for each part that the engine
had ready → the closing event.
A disconnect of the client and the request's time limit end the job at once, in any state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from starlette.types import Receive, Scope, Send

from kvist.checking.constraints import RequestedConstraint
from kvist.errors import EngineError, KvistError, Timeout
from kvist.fairness import CallerPath, caller_path
from kvist.flight.stages import DETOKENISED
from kvist.http.asgi import JSON_TYPE, ClientDisconnected, Headers, cancel_on_disconnect, send_bytes
from kvist.http.traffic import TokenCounts, exchange_of
from kvist.server.flights import recorded
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState, Delta, run_choices

logger = logging.getLogger(__name__)

_INLINE_SIZE = 2048  # token ids and logprobs encoded on the event loop: 1 to 2 ms; a longer answer goes to a thread
_ERROR_EVENT_TIMEOUT_S = 10.0  # how long sending the error event may wait for a slow client

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise buffer events
]


class Format(Protocol):
    """Writes the responses of one API. Holds the bytes that all events of a response share."""

    def event(self, choice: ChoiceState, delta: Delta) -> bytes:
        """Return the server-sent events for a delta. In the APIs where an event is a token, a token without text gets
        an event too."""

    def closing(self, choices: Sequence[ChoiceState]) -> bytes:
        """Return the events after the last delta, including `[DONE]` where the API has it."""

    def failure(self, error: KvistError) -> bytes:
        """Return the event that ends a stream after an error."""

    def whole(self, choices: Sequence[ChoiceState]) -> bytes:
        """Return the JSON body of a response that is not streamed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    choices: Sequence[ChoiceState]
    format: Format
    stream: bool
    headers: Headers = ()  # in addition to those of every response
    constraint: RequestedConstraint | None = None  # of every choice

    @property
    def caller(self) -> CallerPath:
        return caller_path(self.choices[0].request.client)


async def respond(gateway: GatewayContext, job: Job, receive: Receive, send: Send) -> None:
    """Run the job and send its response. Raises `KvistError` only when no byte of the response has been sent."""
    try:
        with gateway.admission.reserve(job.caller, len(job.choices)):
            async with cancel_on_disconnect(receive):
                await (_stream if job.stream else _whole)(gateway, job, send)
    except ClientDisconnected:
        gateway.metrics.num_disconnected += 1
        raise


async def compute(gateway: GatewayContext, choices: Sequence[ChoiceState], scope: Scope, receive: Receive) -> None:
    """Run choices to their ends, for an endpoint that then writes its own response. Raises `KvistError`."""
    try:
        with (
            recorded(gateway, choices, scope),
            gateway.lifecycle.open_request(),
            gateway.admission.reserve(caller_path(choices[0].request.client), len(choices)),
        ):
            async with cancel_on_disconnect(receive):
                await _run_all(gateway, choices)
    except ClientDisconnected:
        gateway.metrics.num_disconnected += 1
        raise
    finally:
        exchange_of(scope).tokens = counted(choices)


async def written(gateway: GatewayContext, choices: Sequence[ChoiceState], write: Callable[[], bytes]) -> bytes:
    """Return the body that `write` makes of the choices, on a thread if it is long."""
    if sum(map(_size, choices)) <= _INLINE_SIZE:
        return write()
    return await gateway.work.run_admitted(caller_path(choices[0].request.client), write)


def counted(choices: Sequence[ChoiceState]) -> TokenCounts:
    """Return the tokens of a job, for the log of requests."""
    first = [choice for choice in choices if not choice.repeats_prompt]
    return TokenCounts(
        num_prompt=sum(choice.request.num_prompt_tokens for choice in first),
        num_output=sum(len(choice.token_ids) for choice in choices),
        num_cached=sum(choice.num_cached_tokens for choice in first),
        is_complete=all(choice.finish_reason is not None for choice in choices),
    )


async def _run_all(gateway: GatewayContext, choices: Sequence[ChoiceState]) -> None:
    try:
        async with _time_limit(gateway), _running(gateway, choices) as deltas:
            async for _ in deltas:
                pass
    except KvistError as error:
        _count_failed(gateway, choices, error)
        raise


async def complete(gateway: GatewayContext, job: Job) -> bytes:
    """Run a job whose places are reserved, and return its whole answer."""
    await _run_all(gateway, job.choices)
    return await written(gateway, job.choices, partial(job.format.whole, job.choices))


async def _whole(gateway: GatewayContext, job: Job, send: Send) -> None:
    body = await complete(gateway, job)
    if (flight := job.choices[0].flight) is not None:
        flight.reached(DETOKENISED)
    await send_bytes(send, body, headers=[JSON_TYPE, *job.headers])


async def _stream(gateway: GatewayContext, job: Job, send: Send) -> None:
    started = False
    logprobs_per_token = job.choices[0].num_logprobs_per_token
    try:
        async with _time_limit(gateway), _running(gateway, job.choices) as deltas:
            async for choice, delta in deltas:
                num_scored = len(delta.logprobs) + len(delta.prompt_logprobs)
                size = _size(choice) if delta.finished else num_scored * logprobs_per_token
                if size <= _INLINE_SIZE:
                    event = job.format.event(choice, delta)
                else:
                    event = await gateway.work.run_admitted(job.caller, partial(job.format.event, choice, delta))
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": [*_SSE_HEADERS, *job.headers]})
                    started = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": job.format.closing(job.choices), "more_body": False})
            return
    except Exception as error:
        known = error if isinstance(error, KvistError) else EngineError("internal error in the gateway; see its log")
        _count_failed(gateway, job.choices, known)
        if not started:
            raise
        if known is not error:
            logger.exception("bug while streaming a response")
        last = job.format.failure(known)
    try:
        async with asyncio.timeout(min(_ERROR_EVENT_TIMEOUT_S, gateway.config.request_timeout_s)):
            await send({"type": "http.response.body", "body": last, "more_body": False})
    except TimeoutError:  # the client reads nothing: release its places
        raise ClientDisconnected from None


def _count_failed(gateway: GatewayContext, choices: Sequence[ChoiceState], error: KvistError) -> None:
    gateway.metrics.num_failed[error.code] += 1
    if (flight := choices[0].flight) is not None:
        flight.error_code = error.code


def _size(choice: ChoiceState) -> int:
    num_prompt_logprobs = len(choice.prompt_logprobs) * choice.num_logprobs_per_token
    return len(choice.token_ids) + choice.num_logprobs + num_prompt_logprobs


def _running(
    gateway: GatewayContext, choices: Sequence[ChoiceState]
) -> contextlib.aclosing[AsyncGenerator[tuple[ChoiceState, Delta], None]]:
    return contextlib.aclosing(run_choices(gateway.dispatcher, choices, gateway.metrics, gateway.clock))


@contextlib.asynccontextmanager
async def _time_limit(gateway: GatewayContext) -> AsyncIterator[None]:
    limit_s = gateway.config.request_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as error:
        raise Timeout(f"the request took longer than {limit_s:g} s (--request-timeout-s) and was stopped") from error
