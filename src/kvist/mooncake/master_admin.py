"""HTTP client of a Mooncake master: its metrics, its segments, the places of keys, and jobs that drain a segment.

The paths are those of `mooncake_master`'s metrics port; `kvist master` answers the same ones. Every call ends within
its timeout, and raises `Unavailable` if the master does not answer, `WireError` if another server does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import httpx
import msgspec

from kvist.errors import UNDECODABLE, KvistError, Unavailable, WireError
from kvist.pool_status import PoolStatus, read_pool_status

TIMEOUT_S = 5.0
QUERY_KEYS = 500  # keys in one question about their places
_MOVES = 1  # copies that the master's own job moves at once; `nodes/emptying.py` moves most of them
_MAX_REASON_CHARS = 200
T = TypeVar("T")


class Segment(msgspec.Struct, frozen=True):
    """Memory that one store has lent to the pool."""

    segment_name: str  # HOST:PORT of the store
    segment_id: str
    client_id: str  # of the run of the store
    status: str  # "OK", "GRACEFULLY_UNMOUNTING", "DRAINING", "DRAINED", ...
    size_bytes: int = 0
    allocator_used_bytes: int = 0


class _Segments(msgspec.Struct):
    segments: list[Segment] = []


class DrainJob(msgspec.Struct, frozen=True):
    """A job of the master that moves the copies of a segment to other segments."""

    success: bool
    job_id: str = ""
    status_name: str = ""
    succeeded_units: int = 0  # copies moved
    failed_units: int = 0
    blocked_units: int = 0  # copies that cannot be moved yet, because a reader holds a lease
    active_units: int = 0
    migrated_bytes: int = 0
    error_message: str = ""

    @property
    def is_done(self) -> bool:
        return self.status_name == "SUCCEEDED"

    @property
    def has_failed(self) -> bool:
        return not self.success or self.status_name in ("FAILED", "CANCELED", "CANCELLED")


class HeldPage(msgspec.Struct, frozen=True, kw_only=True):
    """A page of which a store has a copy."""

    key: str
    num_bytes: int
    num_copies: int  # in the memory of stores; 0: on SSDs only


class _MemoryCopy(msgspec.Struct):
    num_bytes: int = msgspec.field(name="size_", default=0)
    session: str = msgspec.field(name="transport_endpoint_", default="")


class _DiskCopy(msgspec.Struct):
    client_id: str = ""
    object_size: int = 0


class _Places(msgspec.Struct):
    ok: bool
    values: list[_MemoryCopy] | None = None
    local_disk_values: list[_DiskCopy] | None = None


class _Answer(msgspec.Struct):
    data: dict[str, _Places] = {}


class MasterAdmin:
    """Thread-safe. `close` ends the connections."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def pool_status(self) -> PoolStatus:
        return read_pool_status(self.metrics())

    def metrics(self) -> str:
        """Return the text of the master's metrics."""
        return self._get("/metrics").text

    def segments(self) -> list[Segment]:
        return self._decoded(self._get("/get_segments_detail"), _Segments).segments

    def keys(self) -> Iterator[str]:
        """Yield every key of the pool, as the master lists them."""
        try:
            with self._http.stream("GET", "/get_all_keys") as response:
                self._check(response)
                for line in response.iter_lines():
                    if line:
                        yield line
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def only_on_disk_of(self, client_id: str, keys: Sequence[str]) -> list[HeldPage]:
        """Return the pages of `keys` that have no copy but those on the SSD of this run of a store. Keys with a comma
        cannot be asked for, and count as having other copies."""
        return [
            HeldPage(key=key, num_bytes=disks[0].object_size, num_copies=0)
            for key, places in self._places(keys)
            if not places.values
            and (disks := places.local_disk_values)
            and all(disk.client_id == client_id for disk in disks)
        ]

    def in_memory_of(self, session: str, keys: Sequence[str]) -> list[HeldPage]:
        """Return the pages of `keys` that have a copy in the memory of the store whose engine has this session. Keys
        with a comma cannot be asked for."""
        return [
            HeldPage(key=key, num_bytes=copies[0].num_bytes, num_copies=len(copies))
            for key, places in self._places(keys)
            if (copies := places.values) and any(copy.session == session for copy in copies)
        ]

    def _places(self, keys: Sequence[str]) -> list[tuple[str, _Places]]:
        asked = [key for key in keys if "," not in key]
        if not asked:
            return []
        assert len(asked) <= QUERY_KEYS
        found = self._decoded(self._get("/batch_query_keys", {"keys": ",".join(asked)}), _Answer).data
        return [(key, found[key]) for key in asked if key in found and found[key].ok]

    def start_drain(self, segment_names: Sequence[str]) -> DrainJob:
        """Start to move all copies in memory away from the segments, which take no new ones from now on."""
        job = {"segments": list(segment_names), "max_concurrency": _MOVES}
        return self._job(self._answer("POST", "/api/v1/drain_jobs", body=job))

    def drain_job(self, job_id: str) -> DrainJob:
        return self._job(self._answer("GET", "/api/v1/drain_jobs/query", {"job_id": job_id}))

    def cancel_drain(self, job_id: str) -> None:
        """End a job; its segment takes new pages again. Copies that were moved stay where they are now."""
        job = {"job_id": job_id}
        self._job(self._answer("POST", "/api/v1/drain_jobs/cancel", job, body=job))

    def _job(self, response: httpx.Response) -> DrainJob:
        if response.status_code == httpx.codes.UNAUTHORIZED:
            self._check(response)
        return self._decoded(response, DrainJob)  # a refusal has the same fields

    def _get(self, path: str, query: Mapping[str, str] | None = None) -> httpx.Response:
        response = self._answer("GET", path, query)
        self._check(response)
        return response

    def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Mapping[str, object] | None = None,
    ) -> httpx.Response:
        try:
            return self._http.request(method, path, params=query, json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _check(self, response: httpx.Response) -> None:
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise Unavailable(f"the Mooncake master at {self.url} needs an API key, or another one: set --api-key")
        if response.status_code != httpx.codes.OK:
            raise Unavailable(f"the Mooncake master at {self.url} answers {response.status_code}")

    def _decoded(self, response: httpx.Response, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(response.content, type=kind)
        except UNDECODABLE as error:
            raise WireError(f"{self.url} does not answer as a Mooncake master does: {error}") from error

    def _unreachable(self, error: httpx.HTTPError) -> KvistError:
        reason = (str(error) or type(error).__name__)[:_MAX_REASON_CHARS]
        return Unavailable(f"the Mooncake master's HTTP port at {self.url} does not answer: {reason}")
