"""The Mooncake store: pages in the memory of other processes and hosts, over TCP or RDMA, shared by any number of
workers.

    put   header and page, two pieces of one object, from the host pool to the stores that the master chooses;
          small pages over TCP as one piece, from a buffer of ours
    get   replicas of all pages ─► one read a store, all at once ─► verified while the others are under way
                     ▲                     └── failed: other replicas (replicas.py)
                     └ only on a disk of a store, or with a local cache: through a buffer of ours

An object is a page behind its header (page_seals/). Mooncake can return other bytes than those that were put: a put of
an existing key changes nothing, memory may be reused while it is read, and a restored master can hold old places.
Therefore every page is verified: a page that is not what its key says is removed, and counts as a miss.

Reads and writes each have one call of the library at a time, since more are slower. Of two writers one makes headers,
seals and copies while the other's pages are on their way. The master evicts pages; its clients keep no
limit. The host pool is registered for the life of the store, and the headers have memory of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import queue
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvist.clock import Clock, MonotonicClock
from kvist.errors import ConfigError, EngineError, StoreUnreachable
from kvist.mooncake.client import (
    NO_SPACE,
    NOT_FOUND,
    UNREACHABLE,
    Pieces,
    PoolClient,
    PoolSettings,
    check_master,
    code_name,
)
from kvist.mooncake.engine import MooncakeEngine, open_engine
from kvist.mooncake.pool_watch import PoolWatch
from kvist.page_seals.seal import HEADER_BYTES, PageSeals
from kvist.page_seals.secret import read_secret
from kvist.store.backend import StoreContext, StoreStats, Tally
from kvist.store.mooncake_options import STORES_USER, MooncakeStoreOptions
from kvist.store.replicas import ReadPlan, Replica, SuspectStores, num_leading

OBJECT_HEADER_BYTES = 128  # that of PageSeals, padded
_MAX_WRITERS = 2
_MAX_READ_PROCESSES = 3  # each has an engine of its own, whose copies use one core
_CALL_PAGES = 128  # in one call of the library
_STAGED_PAGES = 16  # in one call through the buffer
_SMALL_PAGE_BYTES = 512 << 10  # over TCP a copy of a smaller page costs less than a second piece

assert HEADER_BYTES <= OBJECT_HEADER_BYTES


class _Memory:
    """Memory of our own, registered while the store is open: `rows` [num_rows, row_bytes]."""

    def __init__(self, engine: MooncakeEngine, num_rows: int, row_bytes: int) -> None:
        self._map = mmap.mmap(-1, num_rows * row_bytes)
        self.rows = np.frombuffer(self._map, np.uint8).reshape(num_rows, row_bytes)
        self.addresses = [row.ctypes.data for row in self.rows]
        engine.register(self.addresses[0], num_rows * row_bytes)


@dataclass(frozen=True, slots=True)
class _Writer:
    """The memory of one put. These take memory when they are first used."""

    headers: _Memory
    staging: _Memory


class MooncakeStore:
    """A `PageStore`. Raises `ConfigError` if Mooncake cannot run here, `StoreError` if the pool cannot be used."""

    max_readers: int | None = 1
    max_writers: int | None = _MAX_WRITERS

    def __init__(self, options: MooncakeStoreOptions, context: StoreContext, *, clock: Clock | None = None) -> None:
        options = options.resolved()
        secret = None if context.secret_path is None else read_secret(context.secret_path)
        api_key = options.master_api_key()
        self._seals = PageSeals(context.namespace, context.page_bytes, secret)
        self._page_bytes = context.page_bytes
        self._object_bytes = OBJECT_HEADER_BYTES + context.page_bytes
        self._num_replicas = options.mooncake_replica_num
        self._puts_copies = options.mooncake_protocol == "tcp" and context.page_bytes < _SMALL_PAGE_BYTES
        self._has_cache = options.local_cache_bytes > 0
        self.max_read_processes = 0 if self._has_cache else _MAX_READ_PROCESSES  # each would have a cache of its own
        self._clock = clock or MonotonicClock()
        self._tally = Tally()
        self._suspects = SuspectStores()
        self._writers: queue.SimpleQueue[_Writer] = queue.SimpleQueue()  # idle
        self._stored_bytes = 0  # by this process
        self._turns = itertools.count(random.randrange(1 << 16))
        if self._has_cache and options.local_cache_bytes < self._object_bytes:
            raise ConfigError(
                f"a local cache of {options.local_cache_bytes} bytes is smaller than one page of {self._page_bytes} "
                "bytes: raise its size, or omit it",
                param="mooncake_local_cache_size",
            )
        settings = PoolSettings(
            master=options.master,
            tenant=options.mooncake_tenant_id or "default",
            segment_bytes=0 if context.only_reads else options.segment_bytes,
            local_cache_bytes=options.local_cache_bytes,
            object_bytes=self._object_bytes,
        )
        try:
            engine = open_engine(options.network(context.advertised_host), STORES_USER)
        except ConfigError as error:
            raise ConfigError(error.message, param=error.param or "mooncake_host") from error
        try:
            if context.host_memory is not None:
                engine.register(context.host_memory.address, context.host_memory.num_bytes)
            self._reading, self._putting, self._counting = (threading.Lock() for _ in range(3))
            self._headers = _Memory(engine, _CALL_PAGES, OBJECT_HEADER_BYTES)  # of pages that are read
            self._staging = _Memory(engine, _STAGED_PAGES, self._object_bytes)
            for _ in range(_MAX_WRITERS):
                self._writers.put(
                    _Writer(
                        _Memory(engine, _CALL_PAGES, OBJECT_HEADER_BYTES),
                        _Memory(engine, _STAGED_PAGES, self._object_bytes),
                    )
                )
            self._client = PoolClient(engine, settings)
            self._watch = None if context.only_reads else PoolWatch(options.master_url, api_key=api_key)
        except EngineError as error:
            engine.close()
            raise ConfigError(error.message, param="mooncake_protocol") from error
        except BaseException:
            engine.close()
            raise

    def exists(self, keys: Sequence[bytes]) -> int:
        codes: list[int] = []
        with self._until_closed():
            codes = self._client.exists(self.names(keys))
        self._count_errors(codes)
        return num_leading(code == 1 for code in codes)

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        num_hits = 0
        for first in range(0, len(keys), _CALL_PAGES):
            part = slice(first, first + _CALL_PAGES)
            with self._reading, self._until_closed():
                num_read = self._get(keys[part], into[part])
                num_hits += num_read
            if num_hits < min(part.stop, len(keys)):
                break
        self._tally.add(num_hits=num_hits, num_misses=len(keys) - num_hits)
        return num_hits

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        num_stored = 0
        for first in range(0, len(keys), _CALL_PAGES):
            part = slice(first, first + _CALL_PAGES)
            with self._writer() as writer, self._until_closed():
                num_stored += self._put(writer, keys[part], pages[part])
            if num_stored < min(part.stop, len(keys)):
                break
        return num_stored

    def probe(self) -> None:
        self._check_answers(f"{self._seals.space.hex()}-probe")

    def stats(self) -> StoreStats:
        return self._tally.stats(self._stored_bytes, None if self._watch is None else self._watch.latest)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._client.close()

    # ------------------------------------------------------------ reading

    def _get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        names = self.names(keys)
        oks = [False] * len(keys)
        if self._has_cache:
            self._get_staged(range(len(keys)), names, keys, into, oks)
        if not all(oks):
            self._get_from_memory(names, keys, into, oks)
        return num_leading(oks)

    def _get_from_memory(
        self, names: Sequence[str], keys: Sequence[bytes], into: Sequence[memoryview], oks: list[bool]
    ) -> None:
        """Read the pages that are not read from the memory of stores, and those without a copy there through the
        library."""
        found = self._client.replicas(names)
        if not found:
            self._check_answers(names[0])
        plan = ReadPlan([[Replica(*each) for each in found.get(name) or ()] for name in names], next(self._turns))
        elsewhere = [index for index, name in enumerate(names) if name in found and found[name] is None]
        for index in elsewhere:
            plan.skip(index)
        for index, ok in enumerate(oks):
            if ok:
                plan.skip(index)
        while reads := plan.next_reads(self._suspects, self._clock.now_s()):
            self._read_round(plan, reads, keys, into, oks)
        self._get_staged([index for index in elsewhere if not oks[index]], names, keys, into, oks)

    def _read_round(
        self,
        plan: ReadPlan,
        reads: Mapping[str, list[tuple[int, Replica]]],
        keys: Sequence[bytes],
        into: Sequence[memoryview],
        oks: list[bool],
    ) -> None:
        headers = self._headers
        pieces: dict[str, Pieces] = {}
        for session, pages in reads.items():
            each = pieces[session] = Pieces()
            for index, replica in pages:
                each.add(headers.addresses[index], replica.address, OBJECT_HEADER_BYTES)
                each.add(_address(into[index]), replica.address + OBJECT_HEADER_BYTES, self._page_bytes)
        broken: list[int] = []

        def on_ended(session: str, ok: bool) -> None:
            plan.ended(session, ok)
            if not ok:
                self._suspects.add(session, self._clock.now_s())
                self._tally.library_error("transfer_failed")
                return
            for index, _ in reads[session]:
                oks[index] = headers.rows[index, :HEADER_BYTES].tobytes() == self._seals.header(
                    keys[index], into[index]
                )
                if not oks[index]:
                    broken.append(index)

        self._client.read(pieces, on_ended)
        self._remove([keys[index] for index in broken])

    def _get_staged(
        self,
        indices: Sequence[int],
        names: Sequence[str],
        keys: Sequence[bytes],
        into: Sequence[memoryview],
        oks: list[bool],
    ) -> None:
        """Read pages with the library, which knows the local cache and the disks of stores, through our buffer: the
        library reads an object in one piece only."""
        for first in range(0, len(indices), _STAGED_PAGES):
            part = indices[first : first + _STAGED_PAGES]
            codes = self._client.get(
                [names[index] for index in part], self._staging.addresses[: len(part)], self._object_bytes
            )
            broken: list[int] = []
            for row, index, code in zip(self._staging.rows, part, codes, strict=False):
                if code == self._object_bytes:
                    into[index][:] = row[OBJECT_HEADER_BYTES:].data
                    oks[index] = row[:HEADER_BYTES].tobytes() == self._seals.header(keys[index], into[index])
                if code > 0 and not oks[index]:
                    broken.append(index)
            self._remove([keys[index] for index in broken])
            self._count_errors([code for code in codes if code < 0])

    def _remove(self, keys: Sequence[bytes]) -> None:
        """Remove pages that are not what their keys say, so that they are stored again."""
        if keys:
            self._tally.add(num_broken=len(keys))
            self._count_errors(self._client.remove(self.names(keys)))

    def _check_answers(self, name: str) -> None:
        """Raises `StoreUnreachable` if the master does not answer."""
        check_master(self._client.settings.master)  # a call would wait longer for a master that is gone
        self._count_errors(self._client.exists([name]))

    # ------------------------------------------------------------ writing

    @contextlib.contextmanager
    def _writer(self) -> Iterator[_Writer]:
        writer = self._writers.get()
        try:
            yield writer
        finally:
            self._writers.put(writer)

    def _put(self, writer: _Writer, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        names = self.names(keys)
        stored = self._client.exists(names)  # for a page that is stored already, this counts as a use
        self._count_errors(stored)
        oks = [code == 1 for code in stored]
        missing = [index for index, ok in enumerate(oks) if not ok]
        if not missing:
            return len(keys)
        batch_pages = _STAGED_PAGES if self._puts_copies else _CALL_PAGES
        codes: list[int] = []
        for first in range(0, len(missing), batch_pages):
            part = missing[first : first + batch_pages]
            put = self._put_copies if self._puts_copies else self._put_pieces
            codes += put(writer, [names[i] for i in part], [keys[i] for i in part], [pages[i] for i in part])
            if any(codes):
                break  # pages after it would not count, and each call may wait for a store that has stopped
        for index, code in zip(missing, codes, strict=False):
            oks[index] = code == 0
        num_written = sum(code == 0 for code in codes)
        with self._counting:
            self._stored_bytes += num_written * self._object_bytes
        self._tally.add(num_written=num_written, num_refused=sum(code == NO_SPACE for code in codes))
        self._count_errors(codes)
        return num_leading(oks)

    def _put_pieces(
        self, writer: _Writer, names: Sequence[str], keys: Sequence[bytes], pages: Sequence[memoryview]
    ) -> list[int]:
        """Put pages from where they are. Return a code for each."""
        headers = writer.headers
        for row, key, page in zip(headers.rows, keys, pages, strict=False):
            row[:HEADER_BYTES] = np.frombuffer(self._seals.header(key, page), np.uint8)
        pieces = list(zip(headers.addresses, map(_address, pages), strict=False))
        sizes = [(OBJECT_HEADER_BYTES, self._page_bytes)] * len(names)
        with self._putting:
            return self._client.put(names, pieces, sizes, num_replicas=self._num_replicas)

    def _put_copies(
        self, writer: _Writer, names: Sequence[str], keys: Sequence[bytes], pages: Sequence[memoryview]
    ) -> list[int]:
        """Put copies of at most `_STAGED_PAGES` pages, each behind its header. Return a code for each."""
        staging = writer.staging
        for row, key, page in zip(staging.rows, keys, pages, strict=False):
            row[OBJECT_HEADER_BYTES:] = np.frombuffer(page, np.uint8)
            row[:HEADER_BYTES] = np.frombuffer(self._seals.header(key, row[OBJECT_HEADER_BYTES:].data), np.uint8)
        pieces = [(address,) for address in staging.addresses[: len(names)]]
        sizes = [(self._object_bytes,)] * len(names)
        with self._putting:
            return self._client.put(names, pieces, sizes, num_replicas=self._num_replicas)

    # ------------------------------------------------------------ names and codes

    def names(self, keys: Sequence[bytes]) -> list[str]:
        """Return the names of pages in the pool."""
        return [f"{self._seals.space.hex()}-{key.hex()}" for key in keys]

    def _count_errors(self, codes: Sequence[int]) -> None:
        """Count the codes that are errors. Raises `StoreUnreachable` if the master has answered for no page."""
        for code in codes:
            if code < 0 and code not in (NO_SPACE, NOT_FOUND):
                self._tally.library_error(code_name(code))
        if codes and all(code in UNREACHABLE for code in codes):
            raise StoreUnreachable(
                f"the Mooncake master at {self._client.settings.master} does not answer ({code_name(codes[0])})"
            )

    @contextlib.contextmanager
    def _until_closed(self) -> Iterator[None]:
        """A closed store has no pages."""
        try:
            yield
        except StoreUnreachable:
            if not self._client.is_closed:
                raise


def _address(page: memoryview) -> int:
    return np.frombuffer(page, np.uint8).ctypes.data
