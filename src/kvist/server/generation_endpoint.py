"""The endpoint of a request that generates: body → job → response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.types import Receive, Scope, Send

from kvist.flight.stages import GRAMMAR
from kvist.http.asgi import cancel_on_disconnect
from kvist.http.caller import Caller, caller_of
from kvist.http.traffic import exchange_of
from kvist.server.constraints import compile_constraint
from kvist.server.flights import recorded
from kvist.server.gateway import GatewayContext
from kvist.server.middleware import Endpoint
from kvist.server.respond import Job, counted, respond


def generation_endpoint(gateway: GatewayContext, make_job: Callable[[GatewayContext, Caller, bytes], Job]) -> Endpoint:
    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        gateway.lifecycle.check()
        job = await gateway.prepare(scope, receive, partial(make_job, gateway, caller_of(scope)))
        await run_job(gateway, job, scope, receive, send)

    return endpoint


async def run_job(gateway: GatewayContext, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
    """Compile the constraint of the job, run the job, and send its response. Raises `KvistError` only when no byte of
    the response has been sent."""
    try:
        with recorded(gateway, job.choices, scope):
            if job.constraint is not None:
                async with cancel_on_disconnect(receive):
                    job = await with_constraint(gateway, job)
            with gateway.lifecycle.open_request():
                await respond(gateway, job, receive, send)
    finally:
        exchange_of(scope).tokens = counted(job.choices)


async def with_constraint(gateway: GatewayContext, job: Job) -> Job:
    """Wait until the constraint of the job is compiled. Return the job with the header that names its ignored parts."""
    if job.constraint is None:
        return job
    headers = [*job.headers, *await compile_constraint(gateway, job.constraint)]
    if (flight := job.choices[0].flight) is not None:
        flight.reached(GRAMMAR)
    return replace(job, headers=headers)
