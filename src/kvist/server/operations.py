"""The endpoints of the operator: switch a worker to another role, drain this server.

POST /role     {"role": "decode", "worker": URL or id}; on a worker's own port without `worker`
POST /drain    stop this server after its open requests, as SIGTERM does
"""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from kvist.api.decoding import BodyDecoder
from kvist.api.schemas import RoleRequest
from kvist.errors import Forbidden, RequestError, error_from_wire
from kvist.http.asgi import send_json
from kvist.server.config import ServerConfig
from kvist.server.gateway import GatewayContext
from kvist.server.routing_fields import ROLES
from kvist.server.web_pages import is_local
from kvist.wire import RoleAnswer, SetRole

_ROLE = BodyDecoder(RoleRequest)


def sender_of(scope: Scope) -> str:
    """Return the client's address."""
    host, _ = scope.get("client") or ("127.0.0.1", 0)
    return str(host)


def require_operator(config: ServerConfig, scope: Scope) -> None:
    """Raise `Forbidden` for a client on another host, unless API keys distinguish the operator from strangers."""
    sender = sender_of(scope)
    if not config.api_key and not is_local(sender):
        raise Forbidden(
            f"{sender} may not operate a server without an API key: start the server with --api-key, or send the "
            "request on its own host"
        )


class Operations:
    """Each public method is one route, raw ASGI."""

    def __init__(self, gateway: GatewayContext) -> None:
        self._gateway = gateway

    async def role(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Switch a worker to another role, at once; its open requests end as they are."""
        require_operator(self._gateway.config, scope)
        request, headers = await self._gateway.prepare(scope, receive, _ROLE.decode)
        role = ROLES.get(request.role)
        if role is None:
            raise RequestError(f"`role` is {request.role!r}; use prefill, decode or unified", param="role")
        answer = await self._gateway.dispatcher.ask_worker(request.worker, SetRole(call_id="", role=role), RoleAnswer)
        if answer.error_code is not None:
            raise error_from_wire(answer.error_code, answer.message)
        await send_json(send, {"success": True, "worker": request.worker, "role": str(role)}, headers=headers)

    async def drain(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stop this server after its open requests, as SIGTERM does. Answers at once."""
        del receive
        require_operator(self._gateway.config, scope)
        lifecycle = self._gateway.lifecycle
        lifecycle.drain()
        await send_json(send, {"success": True, "requests_in_flight": lifecycle.num_open}, status=202)
