"""Logs and counts every HTTP request, answered or refused: a line in the access log and a count in /metrics.

app.py keeps an `Exchange` for each request; protocol.py reports input that it refuses before a request exists. The
query string is not logged, because it may contain secrets.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Scope

from kvist.clock import Clock
from kvist.metrics import Histogram

CLIENT_CLOSED_REQUEST = 499  # nginx's status: the client closed before the response began
_SCOPE_KEY = "kvist.exchange"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_POLLED_PATHS = frozenset({"/health", "/ready", "/server_info", "/metrics"})  # polled by supervisors and scrapers
_POLLED_STATUSES = (200, 503)  # 503: not ready yet
_MAX_PATH_CHARS = 256

logger = logging.getLogger("kvist.access")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    num_prompt: int
    num_output: int
    num_cached: int
    is_complete: bool  # every answer has a finish reason


@dataclass(slots=True, kw_only=True, eq=False)
class Exchange:
    """One request and its response. Mutable; owned by the task that handles the request."""

    request_id: str
    start_s: float
    body_read_s: float | None = None
    status: int | None = None  # None until the response begins
    tokens: TokenCounts | None = None


def exchange_of(scope: Scope) -> Exchange:
    exchange: Exchange = scope[_SCOPE_KEY]
    return exchange


class TrafficMetrics(Protocol):
    """The part of a server's metrics that its traffic writes."""

    num_http_requests: Counter[tuple[str, str, str]]  # by method, path and status
    num_refused_connections: int
    loop_lag_s: Histogram


class Traffic:
    def __init__(
        self,
        metrics: TrafficMetrics,
        clock: Clock,
        *,
        paths: Collection[str],
        polled: Collection[str] = (),
        access_log: bool = True,
    ) -> None:
        """`paths` become label values; all others are counted as "other". `polled` are logged at DEBUG, as probes."""
        self._metrics = metrics
        self._clock = clock
        self._paths = frozenset(path for path in paths if "{" not in path)
        self._prefixes = [path.partition("{")[0] for path in paths if "{" in path]
        self._polled = _POLLED_PATHS.union(polled)
        self._access_log = access_log

    def observe_loop_lag(self, by_s: float) -> None:
        self._metrics.loop_lag_s.observe(by_s)

    def begin(self, scope: Scope, request_id: str) -> Exchange:
        exchange = Exchange(request_id=request_id, start_s=self._clock.now_s())
        scope[_SCOPE_KEY] = exchange
        return exchange

    def end(self, scope: Scope, exchange: Exchange) -> None:
        status = CLIENT_CLOSED_REQUEST if exchange.status is None else exchange.status
        method, path = scope["method"], scope["path"]
        label = self._label(path)
        self._metrics.num_http_requests[method if method in _METHODS else "other", label, str(status)] += 1
        is_poll = path in self._polled and status in _POLLED_STATUSES
        level = logging.DEBUG if is_poll else logging.INFO
        if not self._access_log or not logger.isEnabledFor(level):
            return
        duration_ms = (self._clock.now_s() - exchange.start_s) * 1000
        tokens = exchange.tokens
        counted = "" if tokens is None else " in=%d out=%d cached=%d"
        if tokens is not None and status == 200 and not tokens.is_complete:
            counted += " unfinished"  # an error or a disconnect ended the stream
        numbers = () if tokens is None else (tokens.num_prompt, tokens.num_output, tokens.num_cached)
        logger.log(
            level,
            "%s %s %d %.1f ms" + counted + " id=%s client=%s",
            method,
            path[:_MAX_PATH_CHARS],
            status,
            duration_ms,
            *numbers,
            exchange.request_id,
            _address(scope.get("client")),
        )

    def refused(self, status: int, client: tuple[str, int] | None, why: str) -> None:
        """Record input that was refused before it became a request."""
        self._metrics.num_http_requests["other", "other", str(status)] += 1
        if self._access_log:
            logger.info("- - %d client=%s: %s", status, _address(client), why)

    def connection_refused(self, client: tuple[str, int] | None, why: str) -> None:
        self._metrics.num_refused_connections += 1
        self.refused(503, client, why)

    def _label(self, path: str) -> str:
        if path in self._paths:
            return path
        return next((f"{prefix}*" for prefix in self._prefixes if path.startswith(prefix)), "other")


def _address(client: tuple[str, int] | None) -> str:
    return "?" if client is None else f"{client[0]}:{client[1]}"
