"""The endpoints of a router's workers: list, add, announce and remove them. Fields have SGLang's names where it has
them.

GET    /workers                  all workers
POST   /workers                  {"url": ..., "worker_type": ...}: the operator names a worker; with `instance`,
                                 a worker announces itself (cluster/joining.py)
GET    /workers/{URL or id}      one worker
DELETE /workers/{URL or id}      its open requests may finish; with ?instance=, a worker withdraws itself
"""

from __future__ import annotations

from typing import Protocol
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from kvist.api.decoding import BodyDecoder
from kvist.api.schemas import WorkerRequest
from kvist.channel import PROOF_HEADER
from kvist.errors import RequestError, UnknownWorker
from kvist.http.asgi import header, query_of, send_json
from kvist.http.caller import own_key
from kvist.request import Role
from kvist.router.members import MemberCounts
from kvist.router.membership import Announcement
from kvist.router.stream import WorkerSnapshot
from kvist.server.gateway import GatewayContext
from kvist.server.operations import require_operator, sender_of

_DECODER = BodyDecoder(WorkerRequest)
_ROLES: dict[str | None, Role | None] = {None: None, "regular": None, "prefill": Role.PREFILL, "decode": Role.DECODE}
_SHORTEST_INTERVAL_S, _LONGEST_INTERVAL_S = 0.1, 60.0
_MAX_INSTANCE_CHARS = 64


class WorkerSet(Protocol):
    """The members of a router (router/members.py)."""

    def add(self, url: str, role: Role | None, *, sender: str, api_key: str | None) -> str: ...

    def remove(self, name: str, *, sender: str) -> str: ...

    def announce(self, announcement: Announcement, *, sender: str, proof: str) -> str: ...

    def withdraw(self, url: str, instance: str, *, sender: str, proof: str) -> None: ...

    def counts(self) -> MemberCounts: ...


class Workers:
    """Each public method is one route, raw ASGI."""

    def __init__(self, gateway: GatewayContext, members: WorkerSet | None) -> None:
        self._gateway = gateway
        self._members = members

    async def all(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            workers = [_listed(worker) for worker in self._snapshots()]
            types = [str(worker["worker_type"]) for worker in workers]
            stats = {f"{kind}_count": types.count(kind) for kind in ("prefill", "decode", "regular")}
            await send_json(send, {"workers": workers, "total": len(workers), "stats": stats})
            return
        members = self._require_members()
        request, ignored = await self._gateway.prepare(scope, receive, _DECODER.decode)
        sender = sender_of(scope)
        if request.instance is None:
            require_operator(self._gateway.config, scope)
            role = _role(request.worker_type)
            url = members.add(request.url, role, sender=sender, api_key=request.api_key or own_key(scope))
        else:
            announcement = Announcement(
                url=request.url,
                instance=_instance(request.instance),
                interval_s=min(max(request.interval_s or 0.0, _SHORTEST_INTERVAL_S), _LONGEST_INTERVAL_S),
            )
            url = members.announce(announcement, sender=sender, proof=_proof(scope))
        location = f"/workers/{quote(url, safe='')}"
        answer = {"status": "accepted", "worker_id": self._find(url)["id"], "url": url, "location": location}
        message = "the worker gets requests once it is ready: see GET /workers"
        headers = [(b"location", location.encode()), *ignored]
        await send_json(send, {**answer, "message": message}, status=202, headers=headers)

    async def one(self, scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        name = scope["path_params"]["worker"]
        if scope["method"] != "DELETE":
            await send_json(send, self._find(name))
            return
        members, sender = self._require_members(), sender_of(scope)
        instance = query_of(scope, "instance").get("instance")
        if instance is None:
            require_operator(self._gateway.config, scope)
            name = members.remove(name, sender=sender)
        else:
            members.withdraw(name, _instance(instance), sender=sender, proof=_proof(scope))
        message = "the worker gets no new request; its open requests may finish"
        await send_json(send, {"status": "accepted", "worker_id": name, "message": message}, status=202)

    def _snapshots(self) -> tuple[WorkerSnapshot, ...]:
        return self._gateway.dispatcher.snapshot().workers

    def _find(self, name: str) -> dict[str, object]:
        for worker in self._snapshots():
            if name in (worker.url, worker.worker_id):
                return _listed(worker)
        raise UnknownWorker(f"there is no worker {name[:200]!r}: GET /workers lists the workers")

    def _require_members(self) -> WorkerSet:
        if self._members is None:
            raise RequestError("this server is a worker: send the request to its router (kvist router)")
        return self._members


def _proof(scope: Scope) -> str:
    return (header(scope, PROOF_HEADER.encode()) or b"").decode("latin-1")


def _instance(given: str) -> str:
    if not given or len(given) > _MAX_INSTANCE_CHARS:
        raise RequestError(f"`instance` must have 1 to {_MAX_INSTANCE_CHARS} characters", param="instance")
    return given


def _role(worker_type: str | None) -> Role | None:
    if worker_type not in _ROLES:
        raise RequestError(
            f"`worker_type` is {worker_type!r}; use prefill, decode, or regular for the worker's own role",
            param="worker_type",
        )
    return _ROLES[worker_type]


def _listed(worker: WorkerSnapshot) -> dict[str, object]:
    kind = "regular" if worker.role in (None, Role.UNIFIED) else str(worker.role)
    return {
        "id": worker.worker_id,
        "url": worker.url,
        "model_id": None if worker.spec is None else worker.spec.model_name,
        "worker_type": kind,
        "is_healthy": worker.alive,
        "load": worker.num_in_flight,
        "role": worker.role_name,
        "state": worker.state,
        "problem": worker.problem,
        "sources": worker.sources,
        "epoch": None if worker.spec is None else worker.spec.epoch,
    }
