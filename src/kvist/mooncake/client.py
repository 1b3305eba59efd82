"""A client of a pool of Mooncake stores: the library's calls, and the names of its codes.

    PoolClient() ──► calls, from any thread ──► close ──► the library's client is closed by the last call under way

The library crashes the process if it is called after its end, and if its setup has failed. `PoolClient` therefore
counts the calls under way; a call after `close` raises `StoreUnreachable`.

Each call has a limit: a master that does not answer fails it after two seconds (`requirements.py`), one that is gone
after at most five. A store that does not answer fails a copy after two seconds without progress.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvist.errors import StoreError, StoreUnreachable
from kvist.mooncake.engine import MooncakeEngine, end_all
from kvist.mooncake.requirements import load

NO_SPACE, NOT_FOUND, LEASED, FAILED_COPY = -200, -704, -706, -800
UNREACHABLE = (-900, -901)
_CODES = {
    -200: "no_space",
    -600: "invalid_parameters",
    -703: "replica_not_ready",
    -704: "not_found",
    -706: "leased",
    -800: "transfer_failed",
    -801: "checksum",
    -900: "rpc_failed",
    -901: "rpc_timeout",
}
_CONNECT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """Of a client of a pool."""

    master: str  # HOST:PORT
    tenant: str = "default"
    segment_bytes: int = 0  # memory of this process that becomes part of the pool
    local_cache_bytes: int = 0  # 0: no local hot cache
    object_bytes: int = 0  # the size of the objects in the local hot cache


@dataclass(slots=True)
class Pieces:
    """Pieces of one store's memory, and where they go. Mutable while it is made."""

    ours: list[int] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)

    def add(self, ours: int, theirs: int, num_bytes: int) -> None:
        self.ours.append(ours)
        self.theirs.append(theirs)
        self.num_bytes.append(num_bytes)


def code_name(code: int) -> str:
    """Return the name of a code of the library, for counters."""
    return _CODES.get(code, f"code_{-code}")


class PoolClient:
    """Thread-safe. Owns the share of the engine, which `close` closes."""

    def __init__(self, engine: MooncakeEngine, settings: PoolSettings) -> None:
        """Raises `StoreError` if the pool refuses the client, `StoreUnreachable` if no master answers."""
        self.settings = settings
        self._engine = engine
        check_master(settings.master)
        library = load("mooncake.store")
        self._replicate_config = library.ReplicateConfig
        client = library.MooncakeDistributedStore()
        with _hot_cache(settings):
            code = client.setup(
                engine.network.host,
                "P2PHANDSHAKE",
                0,
                0,
                engine.network.protocol,
                ",".join(engine.network.devices),
                settings.master,
                engine=engine.for_store(),
                tenant_id=settings.tenant,
            )
        if code:
            raise StoreError(
                f"the Mooncake master at {settings.master} refuses this worker ({code_name(code)}): check that a "
                "Mooncake master of the release 0.3.13 listens there, and its log",
                param="mooncake_master_addr",
            )
        self._client: Any = client
        self._lock = threading.Lock()
        self._num_calls = 0
        self._is_closing = False
        self._segments: list[str] = []
        if settings.segment_bytes:
            mounted = client.allocate_and_mount_segment(settings.segment_bytes, engine.network.protocol)
            self._segments = list(mounted["segment_ids"])
            if mounted["ret"]:
                self.close()
                raise StoreError(
                    f"Mooncake cannot give {settings.segment_bytes} bytes of this host to the pool "
                    f"({code_name(mounted['ret'])}): lower --hicache-mooncake-segment-size",
                    param="mooncake_segment_size",
                )

    def exists(self, names: Sequence[str]) -> list[int]:
        """Return 1, 0 or a negative code for each object. An object that exists is not evicted for its lease."""
        with self._calling() as client:
            return list(client.batch_is_exist(list(names)))

    def put(
        self,
        names: Sequence[str],
        pieces: Sequence[Sequence[int]],
        sizes: Sequence[Sequence[int]],
        *,
        num_replicas: int,
    ) -> list[int]:
        """Store an object from the pieces at these addresses. Return 0 or a negative code for each object. An object
        that exists stays as it is, with 0."""
        config = self._replicate_config()
        config.replica_num = num_replicas
        with self._calling() as client:
            return list(
                client.batch_put_from_multi_buffers(
                    list(names), list(map(list, pieces)), list(map(list, sizes)), config
                )
            )

    def read(self, pieces: Mapping[str, Pieces], on_ended: Callable[[str, bool], None]) -> None:
        """Read pieces of the memory of stores, by session, all stores at once. Calls `on_ended` for each session:
        False means that the read failed, and that part of the bytes may be here."""
        with self._calling():
            sessions = {
                self._engine.reads(session, each.ours, each.theirs, each.num_bytes): session
                for session, each in pieces.items()
            }
            end_all(sessions, lambda reads: on_ended(sessions[reads], reads.is_whole))

    def get(self, names: Sequence[str], addresses: Sequence[int], num_bytes: int) -> list[int]:
        """Read objects from wherever they are, each whole to its address. Return the size or a negative code of
        each."""
        with self._calling() as client:
            return list(client.batch_get_into(list(names), list(addresses), [num_bytes] * len(names)))

    def replicas(self, names: Sequence[str]) -> Mapping[str, list[tuple[str, int]] | None]:
        """Return the copies in the memory of stores, as (session, address), of each object that exists; None if there
        are copies only elsewhere. Objects that exist are not evicted for their lease. Also if the master does not
        answer, all objects are missing."""
        with self._calling() as client:
            found = client.batch_get_replica_desc(list(names))
        return {name: _in_memory(copies) for name, copies in found.items()}

    def remove(self, names: Sequence[str]) -> list[int]:
        """Remove objects, also leased ones. Return 0 or a negative code for each."""
        with self._calling() as client:
            return list(client.batch_remove(list(names), True))

    @property
    def is_closed(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        """Start no further call. The library's client is closed when the last call under way has returned."""
        with self._lock:
            self._is_closing = True
        self._close_if_idle()

    @contextlib.contextmanager
    def _calling(self) -> Iterator[Any]:
        with self._lock:
            if self._is_closing:
                raise StoreUnreachable("the Mooncake store is closed")
            self._num_calls += 1
        try:
            yield self._client
        finally:
            with self._lock:
                self._num_calls -= 1
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        with self._lock:
            client = self._client
            if client is None or not self._is_closing or self._num_calls:
                return
            self._client = None
        if self._segments:
            client.unmount_and_free_segment(self._segments)
        client.close()
        self._engine.close()


def check_master(address: str) -> None:
    """Raises `StoreUnreachable` if the master accepts no connection."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise StoreUnreachable(
            f"no Mooncake master answers at {address} ({error}): start one with `kvist master`, or correct the address",
            param="mooncake_master_addr",
        ) from error


def _in_memory(copies: Sequence[Any]) -> list[tuple[str, int]] | None:
    found = []
    for copy in copies:
        if copy.is_memory_replica() and copy.status.name == "COMPLETE":
            place = copy.get_memory_descriptor().buffer_descriptor
            found.append((place.transport_endpoint, place.buffer_address))
    return found or None


@contextlib.contextmanager
def _hot_cache(settings: PoolSettings) -> Iterator[None]:
    """Set the size of the local hot cache, which the library reads from the environment in its setup."""
    sizes = {"MC_STORE_LOCAL_HOT_CACHE_SIZE": settings.local_cache_bytes}
    if settings.local_cache_bytes:
        sizes["MC_STORE_LOCAL_HOT_BLOCK_SIZE"] = settings.object_bytes
    before = {name: os.environ.pop(name, None) for name in sizes}
    if settings.local_cache_bytes:
        os.environ.update({name: str(size) for name, size in sizes.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
