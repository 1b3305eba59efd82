"""Announces a worker to routers (`kvist serve --router URL`), until the worker stops.

One task for each router: `POST /workers`, repeated after the interval, so that a router that starts later or restarts
gets to know the worker; after a failure the pause doubles up to `_LONGEST_PAUSE_S`. Only changes are logged: the first
success, and each new reason for a failure. At an orderly stop the announcement is withdrawn; otherwise it expires at
the router. The proof shows that the worker has the cluster key (channel/proof.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

import httpx

from kvist.channel import PROOF_HEADER, ClusterProof, bracketed
from kvist.channel.security import WILDCARD_HOSTS

logger = logging.getLogger(__name__)

_REQUEST_TIMEOUT_S = 5.0
_WITHDRAWAL_TIMEOUT_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_MAX_REASON_CHARS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnAddress:
    """Where routers reach the HTTP server of this worker."""

    scheme: str
    host: str  # that the server listens on; may be a wildcard
    port: int
    advertised_host: str | None = None  # used instead of a wildcard

    async def url_for(self, router: str) -> str:
        """Return the worker's URL for this router: with a wildcard, the local address of the way to the router. Raises
        `OSError` if there is no such way."""
        host = self.host
        if host in WILDCARD_HOSTS:
            host = self.advertised_host or await _local_address(router)
        return f"{self.scheme}://{bracketed(host)}:{self.port}"


class Joining:
    """Mutable; used in the event loop of the worker's process."""

    def __init__(
        self,
        *,
        routers: tuple[str, ...],
        own: OwnAddress,
        proof: ClusterProof,
        interval_s: float,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`transport` reaches the routers (None: the network). `api_key` is one that the routers accept."""
        self._own = own
        self._proof = proof
        self._interval_s = interval_s
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._transport = transport
        self._instance = secrets.token_hex(8)
        self._routers = [_Router(url=url) for url in routers]
        self._http: httpx.AsyncClient | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to announce. Call inside the running loop."""
        self._http = httpx.AsyncClient(transport=self._transport, headers=self._headers, trust_env=False)
        for router in self._routers:
            self._tasks.append(asyncio.create_task(self._announce_forever(router), name=f"announcement {router.url}"))

    async def stop(self) -> None:
        """End the announcements, and withdraw them. Takes about a second at most. A second
        call does nothing."""
        if self._http is None:
            return
        http, self._http = self._http, None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._withdraw(http, router) for router in self._routers))
        await http.aclose()

    async def _announce_forever(self, router: _Router) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            reason = await self._announce(router)
            if reason != router.problem:
                if reason:
                    logger.warning("the router at %s has not accepted this worker: %s", router.url, reason)
                else:
                    logger.info("announced at the router %s as %s", router.url, router.announced_url)
            router.problem = reason
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S) if reason else _FIRST_PAUSE_S
            await asyncio.sleep(pause_s if reason else self._interval_s)

    async def _announce(self, router: _Router) -> str:
        """Send one announcement. Return why the router has not accepted it; "" if it has."""
        assert self._http is not None
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                url = await self._own.url_for(router.url)
                router.announced_url = url
                body = {"url": url, "instance": self._instance, "interval_s": self._interval_s}
                answer = await self._http.post(f"{router.url}/workers", json=body, headers=self._proof_of("POST", url))
        except (httpx.HTTPError, OSError) as error:  # OSError includes TimeoutError
            return f"no answer: {str(error) or type(error).__name__}"
        return "" if answer.is_success else _reason_of(answer)

    async def _withdraw(self, http: httpx.AsyncClient, router: _Router) -> None:
        url = router.announced_url
        if url is None:
            return
        target = f"{router.url}/workers/{quote(url, safe='')}?instance={self._instance}"
        try:
            async with asyncio.timeout(_WITHDRAWAL_TIMEOUT_S):
                answer = await http.delete(target, headers=self._proof_of("DELETE", url))
        except (httpx.HTTPError, TimeoutError) as error:
            logger.info("the stop was not reported to the router at %s: %s", router.url, str(error) or "no answer")
        else:
            if not answer.is_success:
                logger.info("the router at %s did not accept the withdrawal: %s", router.url, _reason_of(answer))

    def _proof_of(self, method: str, url: str) -> Mapping[str, str]:
        return {PROOF_HEADER: self._proof.of(method, url, self._instance)}


@dataclass(slots=True, kw_only=True)
class _Router:
    """One router. Mutable; owned by its task, later by `stop`."""

    url: str
    problem: str | None = field(default=None)  # why it has not accepted the last announcement; None before the first
    announced_url: str | None = None  # the worker's URL in the last announcement, which may have arrived


def _reason_of(answer: httpx.Response) -> str:
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = "this is not a Kvist router"
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        message += "; start the worker with an --api-key of the router"
    return f"status {answer.status_code}: {message[:_MAX_REASON_CHARS]}"


async def _local_address(router: str) -> str:
    """Return the local address from which packets to the router leave. Sends nothing but the look-up of its name."""
    parts = urlsplit(router)
    found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
