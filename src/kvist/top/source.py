"""Reads the figures of a server: `GET /dashboard/snapshot`, and of `GET /requests` the slowest of its last requests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import httpx
import msgspec

from kvist.dashboard.snapshot import Snapshot
from kvist.errors import UNDECODABLE, KvistError, Unavailable
from kvist.operate.calls import reported_error
from kvist.operate.config import OperatedServer

T = TypeVar("T")

TIMEOUT_S = 5.0
MAX_BYTES = 16 << 20
NUM_SLOWEST = 8
_SNAPSHOT = "/dashboard/snapshot?points=0"
_SLOWEST = f"/requests?order=slowest&limit={NUM_SLOWEST}"


class SlowStage(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    duration_s: float


class SlowRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a request's record that is shown."""

    id: str
    status: str
    duration_s: float
    ttft_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stages: tuple[SlowStage, ...] = ()


class _Slowest(msgspec.Struct, frozen=True, kw_only=True):
    requests: tuple[SlowRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The last figures, and why there are no newer ones."""

    snapshot: Snapshot | None = None
    slowest: tuple[SlowRequest, ...] | None = None  # None: the server records no requests
    problem: str = ""
    since_unix_s: float | None = None  # of the first reading in a row that failed


class Source:
    """Mutable; owned by one `kvist top`. Keeps its connection."""

    def __init__(self, server: OperatedServer, transport: httpx.BaseTransport | None = None) -> None:
        self._server = server
        self._http = httpx.Client(
            base_url=server.url, headers=server.headers, timeout=TIMEOUT_S, trust_env=False, transport=transport
        )
        self._last = Reading()

    def close(self) -> None:
        self._http.close()

    def read(self) -> Reading:
        """Return the figures now. Raises the error that the server reports, and `Unavailable` without an answer."""
        snapshot = self._get(_SNAPSHOT, Snapshot)
        try:
            slowest = self._get(_SLOWEST, _Slowest).requests
        except KvistError:  # a server of a version without this endpoint
            slowest = None
        self._last = Reading(snapshot=snapshot, slowest=slowest)
        return self._last

    def read_again(self, now_unix_s: float) -> Reading:
        """Return the figures now, or the last ones with the reason why there are no newer ones. Raises an error that
        will stay, such as one of the API key."""
        try:
            return self.read()
        except KvistError as error:
            if not error.retryable:
                raise
            since = self._last.since_unix_s if self._last.since_unix_s is not None else now_unix_s
            self._last = replace(self._last, problem=error.message, since_unix_s=since)
            return self._last

    def _get(self, path: str, kind: type[T]) -> T:
        try:
            with self._http.stream("GET", path) as answer:
                body = bytearray()
                for piece in answer.iter_bytes():
                    body += piece
                    if len(body) > MAX_BYTES:
                        raise Unavailable(f"{self._server.url}{path} has over {MAX_BYTES >> 20} MiB")
        except httpx.HTTPError as error:
            raise Unavailable(
                f"no Kvist server answers at {self._server.url}: {str(error) or type(error).__name__}"
            ) from error
        if not answer.is_success:
            raise _reported(self._server, answer.status_code, bytes(body))
        try:
            return msgspec.json.decode(bytes(body), type=kind)
        except UNDECODABLE as error:
            raise Unavailable(
                f"{self._server.url}{path} has another form than this version knows ({error}): use the kvist top of "
                "the server's version"
            ) from error


def _reported(server: OperatedServer, status: int, body: bytes) -> KvistError:
    try:
        problem = msgspec.json.decode(body)["error"]
        return reported_error(server, str(problem["code"]), str(problem["message"]))
    except (*UNDECODABLE, LookupError, TypeError):
        return Unavailable(f"{server.url} is not a Kvist server of this version: status {status}")
