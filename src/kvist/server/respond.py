"""Runs a job and writes its response, streamed (server-sent events) or whole.

Life of a job: places are taken (admission.py) → choices run → the first delta decides the status: an error before it
is an ordinary HTTP error, after it an `error` event → events, one ASGI send for each part the engine had ready → the
end.
A client that leaves ends all of it at once; so does the request's time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec
from starlette.types import Receive, Send

from kvist.errors import EngineError, KvistError, Timeout
from kvist.fairness import CallerPath, caller_path
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState, Delta, run_choices
from kvist.server.http import JSON_TYPE, ClientDisconnected, Headers, cancel_on_disconnect, error_object, send_bytes

logger = logging.getLogger(__name__)

_INLINE_SIZE = (
    2048  # token ids and logprobs that are written at once: a millisecond or two; more are written on a thread
)
_ERROR_EVENT_TIMEOUT_S = 10.0  # how long a client may take to make room for the event that tells of an error

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class Format(Protocol):
    """One API's way of saying the same thing. Holds the bytes that all events of a response share."""

    def event(self, choice: ChoiceState, delta: Delta) -> bytes:
        """Server-sent events for a delta, never none: one without text tells that a token came."""

    def closing(self, choices: Sequence[ChoiceState]) -> bytes:
        """What follows the last delta, `[DONE]` included."""

    def whole(self, choices: Sequence[ChoiceState]) -> bytes:
        """The JSON body of a response that is not streamed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    choices: Sequence[ChoiceState]
    format: Format
    stream: bool
    headers: Headers = ()  # beside those of every response

    @property
    def caller(self) -> CallerPath:
        return caller_path(self.choices[0].request.client)


async def respond(gateway: GatewayContext, job: Job, receive: Receive, send: Send) -> None:
    """Raises `KvistError` only when no byte of the response has been sent."""
    try:
        with gateway.admission.reserve(job.caller, len(job.choices)):
            async with cancel_on_disconnect(receive):
                await (_stream if job.stream else _whole)(gateway, job, send)
    except ClientDisconnected:
        gateway.metrics.num_disconnected += 1
        raise


async def _whole(gateway: GatewayContext, job: Job, send: Send) -> None:
    try:
        async with _time_limit(gateway), _running(gateway, job) as deltas:
            async for _ in deltas:
                pass
    except KvistError as error:
        gateway.metrics.num_failed[error.code] += 1
        raise
    if sum(map(_size, job.choices)) <= _INLINE_SIZE:
        body = job.format.whole(job.choices)
    else:
        body = await gateway.work.run_admitted(job.caller, partial(job.format.whole, job.choices))
    await send_bytes(send, body, headers=[JSON_TYPE, *job.headers])


async def _stream(gateway: GatewayContext, job: Job, send: Send) -> None:
    started = False
    logprobs_per_token = job.choices[0].num_logprobs_per_token
    try:
        async with _time_limit(gateway), _running(gateway, job) as deltas:
            async for choice, delta in deltas:
                size = _size(choice) if delta.finished else len(delta.logprobs) * logprobs_per_token
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
        gateway.metrics.num_failed[known.code] += 1
        if not started:
            raise
        if known is not error:
            logger.exception("a stream failed in the gateway")
        last = b"event: error\ndata: " + msgspec.json.encode(error_object(known)) + b"\n\n"
    try:
        async with asyncio.timeout(min(_ERROR_EVENT_TIMEOUT_S, gateway.config.request_timeout_s)):
            await send({"type": "http.response.body", "body": last, "more_body": False})
    except TimeoutError:  # it reads nothing: its places are for others
        raise ClientDisconnected from None


def _size(choice: ChoiceState) -> int:
    return len(choice.token_ids) + choice.num_logprobs


def _running(gateway: GatewayContext, job: Job) -> contextlib.aclosing[AsyncGenerator[tuple[ChoiceState, Delta], None]]:
    return contextlib.aclosing(run_choices(gateway.dispatcher, job.choices, gateway.metrics, gateway.clock))


@contextlib.asynccontextmanager
async def _time_limit(gateway: GatewayContext) -> AsyncIterator[None]:
    limit_s = gateway.config.request_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError as error:
        raise Timeout(f"the request took longer than {limit_s:g} s (--request-timeout-s) and was stopped") from error
