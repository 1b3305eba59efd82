"""Makes a job of a chat that was converted from another API's request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvist.agents_api.paths import RequestPaths
from kvist.api.schemas import ChatRequest
from kvist.checking.constraints import RequestedConstraint
from kvist.http.asgi import Headers
from kvist.http.caller import Caller
from kvist.server.gateway import GatewayContext
from kvist.server.jobs import new_job_id
from kvist.server.openai import ChatRun, chat_run
from kvist.server.respond import Format, Job


def job_of_chat(
    gateway: GatewayContext,
    caller: Caller,
    chat: ChatRequest,
    paths: RequestPaths,
    headers: Headers,
    *,
    prefix: str,
    write: Callable[[ChatRun], Format],
) -> Job:
    """`prefix` begins the id of the response; `write` makes its format. The answer ends where the context ends, even
    before `max_tokens`. Raises `RequestError` that names a field of the client's own request."""
    run = paths.checked(
        lambda: chat_run(gateway, caller, chat, headers, new_job_id(prefix), fits_context=True, named=paths.renamed)
    )
    constraint = None if run.constraint is None else _renamed(run.constraint, paths)
    stream = bool(chat.stream)
    return Job(choices=run.choices, format=write(run), stream=stream, headers=run.headers, constraint=constraint)


def _renamed(constraint: RequestedConstraint, paths: RequestPaths) -> RequestedConstraint:
    parts = tuple(_renamed(part, paths) for part in constraint.parts)
    return replace(constraint, param=paths.renamed(constraint.param), parts=parts)


def shown_id(run: ChatRun) -> str:
    """Return the id of the response, as OpenAI and Anthropic write ids: `resp_...`, `msg_...`."""
    return run.job_id.replace("-", "_", 1)
