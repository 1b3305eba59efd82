"""Reads the fields of a request that say where and when it runs: session, worker, role, priority."""

from __future__ import annotations

from dataclasses import dataclass

from kvist.api.decoding import IGNORED
from kvist.api.schemas import Generation, NativeRequest, PlaceOptions, PromptRequest
from kvist.checking.sampling import MAX_ID_CHARS, require, salt_digest, session_digest
from kvist.errors import RequestError
from kvist.http.asgi import Headers
from kvist.http.caller import Caller
from kvist.request import MAX_PRIORITY, Role
from kvist.router.placement import Placement
from kvist.server.gateway import GatewayContext

ROLES = {role.value: role for role in Role}


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where and when the engine requests of a job run."""

    salt: str  # of their pages
    placement: Placement
    priority: int = 0
    background: bool = False  # after all other requests


def checked_routing(
    gateway: GatewayContext, caller: Caller, request: Generation | NativeRequest | PromptRequest, headers: Headers
) -> tuple[Routing, Headers]:
    """Return the routing, and the headers, which name the fields that have no effect here. Raises `RequestError`."""
    salt = salt_digest(request.cache_salt, gateway.tenant(caller))
    session = session_digest(request.session_id, request.prompt_cache_key, salt, header=caller.session)
    placement, unknown = _placement(gateway, request.kvist or PlaceOptions(), session)
    priority, unmet = _priority(gateway, request.priority)
    routing = Routing(salt=salt, placement=placement, priority=priority)
    return routing, with_ignored(headers, [*unknown, *unmet])


def _placement(gateway: GatewayContext, options: PlaceOptions, session: str) -> tuple[Placement, list[str]]:
    worker, ignored = options.worker or "", list[str]()
    require(len(worker) <= MAX_ID_CHARS, "kvist.worker", f"has at most {MAX_ID_CHARS} characters", len(worker))
    if worker and not any(worker in (each.worker_id, each.url) for each in gateway.dispatcher.snapshot().workers):
        worker, ignored = "", ["kvist.worker"]  # it may have left: a hint must not fail the request
    if options.role is not None and options.role not in ROLES:
        raise RequestError(f"`kvist.role` is {options.role!r}; use {', '.join(ROLES)}", param="kvist.role")
    return Placement(session=session, worker=worker, role=ROLES.get(options.role or "")), ignored


def _priority(gateway: GatewayContext, priority: int | None) -> tuple[int, list[str]]:
    if not priority:
        return 0, []
    require(abs(priority) <= MAX_PRIORITY, "priority", f"must be from -{MAX_PRIORITY} to {MAX_PRIORITY}", priority)
    return (priority, []) if gateway.honours_priority() else (0, ["priority"])


def with_ignored(headers: Headers, names: list[str]) -> Headers:
    """Return the headers of a response, with more fields that have no effect."""
    if not names:
        return headers
    before = [value.decode() for name, value in headers if name == IGNORED]
    others = [each for each in headers if each[0] != IGNORED]
    return [*others, (IGNORED, ", ".join([*before, *names]).encode())]
