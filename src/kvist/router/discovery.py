"""Finds the engine of a remote worker through GET /server_info.

The HTTP server of a worker answers before its engine has loaded, with `engine: null`. The same request is sent when an
engine becomes silent: the parent process knows whether the engine computes or hangs. Owns no state; fleet.py decides
when to send the request.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import msgspec

from kvist.channel.security import WILDCARD_HOSTS, bracketed, split_tcp_endpoint
from kvist.errors import UNDECODABLE, Unavailable
from kvist.wire import EngineHealth, EngineSpec

SUSPENDED_S = 1.5  # without heartbeats, of which there are two a second
_MAX_PLACE_CHARS = 200
_MAX_ANSWER_BYTES = 16 << 20


class _ServerInfo(msgspec.Struct, frozen=True):
    engine: EngineSpec | None = None
    engine_health: EngineHealth | None = None


_decoder = msgspec.json.Decoder(_ServerInfo)


def reachable_endpoint(url: str, endpoint: str) -> str:
    """Return the engine's endpoint; for a wildcard bind, with the host of the worker's URL."""
    address = split_tcp_endpoint(endpoint)
    if address is None or address[0] not in WILDCARD_HOSTS:
        return endpoint
    host = urlsplit(url).hostname or ""
    return f"tcp://{bracketed(host)}:{address[1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEngine:
    endpoint: str
    health: EngineHealth | None  # None: the worker does not report it


async def find_engine(
    client: httpx.AsyncClient, url: str, *, api_key: str | None, timeout_s: float, stalled_s: float
) -> FoundEngine:
    """Return the engine of the worker at `url`. Raises `Unavailable` with the reason if there is no engine now, if its
    process is suspended, or if the engine has made no progress for `stalled_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            status, content = await _get(client, f"{url}/server_info", api_key)
    except (httpx.HTTPError, TimeoutError) as error:
        raise Unavailable(f"no answer from {url}/server_info: {str(error) or type(error).__name__}") from error
    if status == httpx.codes.UNAUTHORIZED:
        raise Unavailable(f"{url} refused the API key: start the router with the --api-key of its workers")
    if status != httpx.codes.OK:
        raise Unavailable(f"{url}/server_info answered with status {status}")
    if len(content) > _MAX_ANSWER_BYTES:
        raise Unavailable(f"{url}/server_info sent more than {_MAX_ANSWER_BYTES} bytes: this is not a Kvist worker")
    try:
        info = _decoder.decode(content)
    except UNDECODABLE as error:
        raise Unavailable(f"{url}/server_info does not match a Kvist worker: {error}") from error
    health = info.engine_health
    if info.engine is None:
        if health is None:
            raise Unavailable(f"{url} has no engine: it is a gateway, not a worker")
        if health.problem:
            raise Unavailable(f"the engine at {url} is down: {health.problem}")
        raise Unavailable(f"the engine at {url} is starting" + (f": {health.doing}" if health.doing else ""))
    if health is not None and health.silent_s >= SUSPENDED_S:
        raise Unavailable(
            f"the engine at {url} has made no progress for {health.silent_s:.0f} s: the process is suspended"
        )
    if health is not None and health.stalled_s >= stalled_s:
        raise Unavailable(
            f"the engine at {url} has made no progress for {health.stalled_s:.0f} s: the process is stopped or hangs"
            + (f" in {health.place[:_MAX_PLACE_CHARS]}" if health.place else "")
        )
    return FoundEngine(endpoint=reachable_endpoint(url, info.engine.endpoint), health=health)


async def _get(client: httpx.AsyncClient, url: str, api_key: str | None) -> tuple[int, bytes]:
    """Return status and body; stop reading after `_MAX_ANSWER_BYTES`. Redirects are not followed."""
    content = bytearray()
    headers = {"Accept-Encoding": "identity", **({} if api_key is None else {"Authorization": f"Bearer {api_key}"})}
    async with client.stream("GET", url, headers=headers, timeout=None) as response:
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > _MAX_ANSWER_BYTES:
                break
        return response.status_code, bytes(content)
