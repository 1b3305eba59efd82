"""Sends a request to a running server; its errors name the remedy that an operator has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from kvist.errors import ConfigError, KvistError, Unauthorized, Unavailable, error_from_wire
from kvist.operate.config import OperatedServer, RoleOptions

REQUEST_TIMEOUT_S = 30.0


def switch_role(server: OperatedServer, options: RoleOptions) -> int:
    """Switch a worker to another role; return 0. Raises `KvistError`."""
    if options.worker is None or options.role is None:
        raise ConfigError("name a worker and its new role, as in kvist role 127.0.0.1:30001 decode", param="worker")
    call(server, "POST", "/role", {"worker": options.worker, "role": options.role})
    print(f"{options.worker} is a {options.role} worker now; its open requests end as they are", flush=True)
    return 0


def drain_server(server: OperatedServer) -> int:
    """Let a router or worker refuse new requests, and stop after the open ones; return 0. Raises `KvistError`."""
    answer = call(server, "POST", "/drain")
    print(f"{server.url} drains: {answer.get('requests_in_flight')} requests are open", flush=True)
    return 0


def call(
    server: OperatedServer,
    method: str,
    path: str,
    body: Mapping[str, object] | None = None,
    *,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> dict[str, Any]:
    """Send a request and return the JSON object of its answer. Raises the error that the server reports, and
    `Unavailable` if no Kvist server answers."""
    try:
        with httpx.Client(base_url=server.url, headers=server.headers, timeout=timeout_s, trust_env=False) as http:
            answer = http.request(method, path, json=body)
        decoded = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(f"no Kvist server answers at {server.url}: {str(error) or type(error).__name__}") from error
    if not isinstance(decoded, dict):
        raise Unavailable(f"no Kvist server answers at {server.url}")
    if not answer.is_success:
        problem = decoded.get("error")
        if not isinstance(problem, dict):
            raise Unavailable(f"no Kvist server answers at {server.url}: status {answer.status_code}")
        raise reported_error(server, str(problem.get("code")), str(problem.get("message")))
    return decoded


def reported_error(server: OperatedServer, code: str, message: str) -> KvistError:
    """Return the error that the server reports, with the remedy that an operator's verb has."""
    if code != Unauthorized.code:
        return error_from_wire(code, message)
    if server.api_key is None:
        return Unauthorized(f"{server.url} requires an API key: set KVIST_API_KEY, or add --api-key KEY")
    return Unauthorized(f"{server.url} does not accept this API key: correct KVIST_API_KEY or --api-key")
