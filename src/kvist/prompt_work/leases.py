"""Leases: a client pins the pages of a prompt in the device pool of one worker, for a limited time.

    POST   /v1/leases              computes a prompt, and leases its pages
    GET    /v1/leases              the caller's leases
    GET    /v1/leases/ID           one lease
    POST   /v1/leases/ID/renew     extends its time
    DELETE /v1/leases/ID           ends it

The worker keeps the leases (scheduler/leases.py); a gateway keeps none. The id of a lease therefore names the worker,
and any gateway of the cluster can renew or end a lease. A lease belongs to the API key that took it.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from starlette.types import Receive, Scope, Send

from kvist.api.decoding import BodyDecoder
from kvist.api.schemas import LeaseRequest, RenewRequest
from kvist.checking.sampling import require
from kvist.clock import unix_time_s
from kvist.errors import EngineError, LeaseNotFound, Unavailable, UnknownWorker, error_from_wire
from kvist.http.asgi import send_json
from kvist.http.caller import Caller, caller_of
from kvist.lease_messages import LeaseAnswer, LeaseCommand, LeaseStatus
from kvist.prompt_work.prompts import PromptWork, computed_and_cached, prompt_work, usage
from kvist.request import MAX_LEASE_TTL_S, LeaseTerms
from kvist.server.gateway import GatewayContext
from kvist.server.respond import compute

_LEASE, _RENEW = BodyDecoder(LeaseRequest), BodyDecoder(RenewRequest)
_DEFAULT_TTL_S = 60.0
_PREFIX = "lease-"
_LEASE_AGAIN = "lease the prompt again"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseName:
    """The id of a lease as clients see it: its id at the worker, and the worker."""

    lease_id: str
    worker_id: str

    def __str__(self) -> str:
        worker = base64.urlsafe_b64encode(self.worker_id.encode()).decode().rstrip("=")
        return f"{_PREFIX}{self.lease_id}.{worker}"

    @staticmethod
    def parse(text: str) -> LeaseName:
        """Raises `LeaseNotFound`."""
        lease_id, _, worker = text.removeprefix(_PREFIX).partition(".")
        try:
            worker_id = base64.urlsafe_b64decode(worker + "=" * (-len(worker) % 4)).decode()
        except ValueError:  # also UnicodeDecodeError
            worker_id = ""
        if not text.startswith(_PREFIX) or not lease_id or not worker_id:
            raise LeaseNotFound(f"{text[:200]!r} is not the id of a lease: POST /v1/leases returns one")
        return LeaseName(lease_id=lease_id, worker_id=worker_id)


class Leases:
    """Each public method is one endpoint, raw ASGI."""

    def __init__(self, gateway: GatewayContext) -> None:
        self._gateway = gateway

    async def all(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (self._take if scope["method"] == "POST" else self._list)(scope, receive, send)

    async def one(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Return a lease, or end it."""
        del receive
        name, ends = _name_of(scope), scope["method"] == "DELETE"
        status = await self._ask(scope, name, "end" if ends else "list")
        answer = {"id": str(name), "object": "lease", "deleted": True} if ends else self._lease(name, status)
        await send_json(send, answer)

    async def renew(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = _name_of(scope)
        ttl_s, headers = await self._gateway.prepare(scope, receive, _renewal)
        status = await self._ask(scope, name, "renew", ttl_s)
        await send_json(send, self._lease(name, status), headers=headers)

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        gateway.lifecycle.check()
        work = await gateway.prepare(scope, receive, partial(self._work, caller_of(scope)))
        choice = work.choice
        await compute(gateway, [choice], scope, receive)
        if choice.lease is None or choice.prefill_worker is None:
            raise EngineError("the worker has computed the prompt and granted no lease; this is a bug in Kvist")
        name = LeaseName(lease_id=choice.lease.lease_id, worker_id=choice.prefill_worker)
        answer = {
            **self._lease(name, choice.lease),
            "created": unix_time_s(),
            **computed_and_cached([choice]),
            "usage": usage(work.num_prompt_tokens, [choice]),
        }
        await send_json(send, answer, headers=work.headers)

    def _work(self, caller: Caller, body: bytes) -> PromptWork:
        self._gateway.require_tokenizer()
        request, headers = _LEASE.decode(body)
        terms = LeaseTerms(lease_id=secrets.token_hex(8), ttl_s=_checked_ttl_s(request.ttl_s))
        return prompt_work(self._gateway, caller, request, headers, kind="lease", lease=terms)

    async def _list(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        command = LeaseCommand(call_id="", action="list", owner=_owner_of(scope))
        answers = await self._gateway.dispatcher.ask_workers(command, LeaseAnswer)
        found = [
            self._lease(LeaseName(lease_id=each.lease_id, worker_id=worker_id), each)
            for worker_id, answer in sorted(answers.items())
            for each in answer.leases
        ]
        await send_json(send, {"object": "list", "data": found})

    async def _ask(
        self, scope: Scope, name: LeaseName, action: Literal["renew", "end", "list"], ttl_s: float = 0.0
    ) -> LeaseStatus:
        """Send a command to the worker of the lease. Raises `LeaseNotFound` also if the worker is lost: its pages
        cannot be reached."""
        owner = _owner_of(scope)
        command = LeaseCommand(call_id="", action=action, owner=owner, lease_id=name.lease_id, ttl_s=ttl_s)
        try:
            answer = await self._gateway.dispatcher.ask_worker(name.worker_id, command, LeaseAnswer)
        except (UnknownWorker, Unavailable) as error:
            raise LeaseNotFound(f"the worker of this lease is gone ({error.message}): {_LEASE_AGAIN}") from error
        if answer.error_code is not None:
            raise error_from_wire(answer.error_code, answer.message)
        if len(answer.leases) != 1:
            raise EngineError(f"worker {name.worker_id} answered with {len(answer.leases)} leases; a bug in Kvist")
        return answer.leases[0]

    def _lease(self, name: LeaseName, status: LeaseStatus) -> dict[str, object]:
        return {
            "id": str(name),
            "object": "lease",
            "model": self._gateway.model_name,
            "worker": name.worker_id,
            "num_pages": status.num_pages,
            "num_tokens": status.num_tokens,
            "left_s": round(status.left_s, 3),
            "expires_at": unix_time_s() + max(0, int(status.left_s)),
        }


def _renewal(body: bytes) -> tuple[float, Sequence[tuple[bytes, bytes]]]:
    request, headers = _RENEW.decode(body) if body else (RenewRequest(), ())
    return _checked_ttl_s(request.ttl_s), headers


def _checked_ttl_s(ttl_s: float | None) -> float:
    if ttl_s is None:
        return _DEFAULT_TTL_S
    require(1 <= ttl_s <= MAX_LEASE_TTL_S, "ttl_s", f"must be 1 to {MAX_LEASE_TTL_S:g} seconds", ttl_s)
    return ttl_s


def _name_of(scope: Scope) -> LeaseName:
    return LeaseName.parse(scope["path_params"]["lease"])


def _owner_of(scope: Scope) -> str:
    """Return the caller as engines know the owner of its leases."""
    return caller_of(scope).path[0]
