"""The cluster as its HTTP servers show it: workers and pauses of a router, versions and pages of each process."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from kvist.clock import MonotonicClock
from kvist.errors import KvistError, Timeout, Unavailable
from kvist.operate.calls import call
from kvist.operate.config import OperatedServer
from kvist.request import Role
from kvist.upgrade.report import PauseCounts

REQUEST_TIMEOUT_S = 5.0
EMPTY_TIMEOUT_S = 300.0  # for a store to move its pages to the others
POLL_S = 0.25
PAUSES = "kvist:inter_token_latency_seconds"
_BUCKET = re.compile(rf'^{PAUSES}_bucket\{{le="([^"]+)"\}} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as a router sees it."""

    role: Role | None  # None: not known yet
    is_usable: bool
    problem: str = ""
    is_named_by_hand: bool = False  # by POST /workers alone: another router does not know it by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """A server's own report. `num_pages` is of a worker's host tier."""

    version: str | None = None
    num_pages: int | None = None


class ClusterView(Protocol):
    """The questions of an upgrade to the processes. Each method may raise `KvistError`."""

    def workers(self, router: str) -> Mapping[str, WorkerView]:
        """Return the workers that the router at this URL knows, by URL."""
        ...

    def join(self, router: str, worker: str) -> None: ...

    def leave(self, router: str, worker: str) -> None: ...

    def server(self, url: str) -> ServerView: ...

    def pauses(self, router: str) -> PauseCounts: ...

    def empty_store(self, url: str) -> None:
        """Return when the pages of the store are in other stores."""
        ...


class HttpClusterView:
    """Sends one request for each question."""

    def __init__(self, api_key: str | None = None) -> None:
        self._api_key = api_key

    def workers(self, router: str) -> Mapping[str, WorkerView]:
        return {worker["url"]: _worker(worker) for worker in self._ask(router, "GET", "/workers")["workers"]}

    def join(self, router: str, worker: str) -> None:
        self._ask(router, "POST", "/workers", {"url": worker})

    def leave(self, router: str, worker: str) -> None:
        self._ask(router, "DELETE", f"/workers/{quote(worker, safe='')}")

    def server(self, url: str) -> ServerView:
        seen = self._ask(url, "GET", "/server_info")
        loads = [worker["load"] for worker in seen.get("workers", ()) if worker.get("load")]
        pages = [load["num_host_pages"] for load in loads if load.get("num_host_pages")]
        num_pages = sum(int(each.get("cached", 0)) for each in pages) if pages else None
        return ServerView(version=seen.get("version"), num_pages=num_pages)

    def pauses(self, router: str) -> PauseCounts:
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        try:
            answer = httpx.get(f"{router}/metrics", headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=False)
        except httpx.HTTPError as error:
            raise Unavailable(f"no metrics at {router}: {error or type(error).__name__}") from error
        return {float(bound): float(count) for bound, count in _BUCKET.findall(answer.text)}

    def empty_store(self, url: str) -> None:
        clock = MonotonicClock()
        deadline_s = clock.now_s() + EMPTY_TIMEOUT_S
        progress = self._ask(url, "POST", "/drain")
        while not progress.get("done"):
            if progress.get("error"):
                raise Unavailable(f"{url} is not empty: {progress['error']}")
            if clock.now_s() > deadline_s:
                raise Timeout(f"{url} is not empty after {EMPTY_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
            progress = self._ask(url, "GET", "/drain")

    def _ask(self, url: str, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        server = OperatedServer(url=url, api_key=self._api_key)
        return call(server, method, path, body, timeout_s=REQUEST_TIMEOUT_S)


def _worker(listed: Mapping[str, Any]) -> WorkerView:
    try:
        return WorkerView(
            role=None if listed["role"] == "unknown" else Role(listed["role"]),
            is_usable=bool(listed["is_healthy"]),
            problem=str(listed["problem"] or listed["state"]),
            is_named_by_hand=list(listed["sources"]) == ["http"],
        )
    except (LookupError, ValueError, TypeError) as error:
        raise KvistError(f"a router's list of workers cannot be read: {error!r}") from error
