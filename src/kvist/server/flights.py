"""Records requests that generate: where their time goes (flight/).

A request is recorded from the moment it has a prompt; a request that is refused before has none of the stages below.

    received → tokenised → (grammar) → the dispatcher's stages (flight/timeline.py) → detokenised → sent
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.types import Scope

from kvist.errors import EngineError, KvistError
from kvist.flight.flight import Flight, Progress
from kvist.flight.records import CachedTokens
from kvist.flight.stages import RECEIVED, TOKENISED
from kvist.http.arrival import arrival_of
from kvist.http.asgi import ClientDisconnected
from kvist.http.traffic import exchange_of
from kvist.server.gateway import GatewayContext
from kvist.server.generation import ChoiceState


@contextmanager
def recorded(gateway: GatewayContext, choices: Sequence[ChoiceState], scope: Scope) -> Iterator[None]:
    """Record the request of these choices until the end of the block. Raises `RequestError` for an invalid header."""
    now_s, response_id = gateway.clock.now_s(), choices[0].request.request_id.rpartition("-")[0]
    arrival = arrival_of(scope, response_id=response_id, model=gateway.model_name, now_s=now_s)
    if not gateway.flights.is_on and not arrival.wants_trace:
        yield
        return
    flight = Flight(arrival, gateway.clock.now_s, lambda: progress_of(choices), len(choices))
    flight.reached(RECEIVED, exchange_of(scope).body_read_s or now_s)
    flight.reached(TOKENISED, now_s)
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
        flight.ends()
        gateway.flights.end(flight)


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
