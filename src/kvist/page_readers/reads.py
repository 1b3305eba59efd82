"""The engine's side of the reader processes: a `PageStore` whose reads are made by processes.

    opened ─► processes are started ─► each is used once it has opened the store; until then, threads read themselves
    a reader dies ─► its call is read by the thread ─► a new process, at most every `RESTART_S`
    close ─► the sockets end, and with them the processes

A call takes an idle process and waits for its answer without Python's lock. When the answer has come, or the socket has
ended, the process writes no more: a socket ends when its process has released its memory. A process that hangs
keeps its call, as a thread that hangs does, and the call's slots stay in quarantine.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from kvist.clock import Clock, MonotonicClock
from kvist.cores import num_usable_cores
from kvist.door import Given
from kvist.errors import StoreError, StoreUnreachable
from kvist.page_readers.messages import (
    MAX_MESSAGE_BYTES,
    Answer,
    Done,
    Failed,
    Opened,
    Read,
    Setup,
    decode_answer,
    encode,
)
from kvist.store.backend import HostMemory, PageStore, StoreContext, StoreStats

READER = (sys.executable, "-m", "kvist.page_readers.process")
RESTART_S = 5.0
_END_S = 2.0  # from the end of the socket to a kill
_MIN_CORES = 4
_MAX_PROCESSES = 12  # with more, the bandwidth of the memory is the limit

logger = logging.getLogger(__name__)


def default_processes() -> int:
    """Return the number of reader processes of a store without a limit of its own: on few cores they gain nothing."""
    num_cores = num_usable_cores()
    return min(_MAX_PROCESSES, 3 * num_cores // 4) if num_cores >= _MIN_CORES else 0


def read_by_processes(
    store: PageStore,
    backend: str,
    options: Given,
    context: StoreContext,
    *,
    most: int | None = None,
    clock: Clock | None = None,
) -> PageStore:
    """Return the open store with reads by at most this many processes, or the store itself if no other process can read
    for it."""
    memory = context.host_memory
    number = min(store.max_read_processes, default_processes() if most is None else most)
    if number == 0 or memory is None or memory.fd is None:
        return store
    setup = Setup(
        backend=backend,
        options=options,
        namespace=context.namespace,
        page_bytes=context.page_bytes,
        num_bytes=memory.num_bytes,
        advertised_host=context.advertised_host,
        secret_path=None if context.secret_path is None else str(context.secret_path),
    )
    pool_fd = memory.fd
    return ProcessReads(store, lambda: ReaderProcess(setup, pool_fd), memory, number, clock=clock)


class ReaderDied(Exception):
    """The process has ended before its answer, and writes no more."""


class ReaderProcess:
    """One reader. Mutable; used by one thread at a time."""

    def __init__(self, setup: Setup, pool_fd: int) -> None:
        """Starts the process; raises `OSError`. The setup is sent at once, its answer is awaited by `is_ready`."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    READER,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                )
                socket.send_fds(self._socket, [encode(setup)], [pool_fd])
            except BaseException:
                self._socket.close()
                raise
        self._is_open = False
        self.counted = Done(num_pages=0, errors={}, num_hits=0, num_misses=0, num_broken=0)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ready(self) -> bool:
        """Return whether the process has opened the store; never waits. Raises `ReaderDied` if it cannot."""
        if not self._is_open and select.select([self._socket], [], [], 0)[0]:
            answer = self._receive()
            if not isinstance(answer, Opened):
                raise ReaderDied(answer.message if isinstance(answer, Failed) else "an unexpected answer")
            self._is_open = True
        return self._is_open

    def read(self, keys: Sequence[bytes], offsets: Sequence[int]) -> int:
        """Read the pages to these offsets in the pool. Return how many leading pages were read. Raises `ReaderDied`, or
        the error of the store."""
        try:
            self._socket.send(encode(Read(keys=tuple(keys), offsets=tuple(offsets))))
        except OSError as error:
            raise ReaderDied(str(error)) from error
        answer = self._receive()
        if isinstance(answer, Done):
            self.counted = answer
            return answer.num_pages
        message = answer.message if isinstance(answer, Failed) else "an unexpected answer"
        raise StoreUnreachable(message) if isinstance(answer, Failed) and answer.unreachable else StoreError(message)

    def _receive(self) -> Answer:
        try:
            message = self._socket.recv(MAX_MESSAGE_BYTES)
        except OSError as error:
            raise ReaderDied(str(error)) from error
        if not message:
            raise ReaderDied("the process has ended")
        return decode_answer(message)

    def end(self) -> None:
        """Let the process end by the end of its socket."""
        self._socket.close()

    def join(self) -> None:
        """Wait for the end of the process, and kill it if it takes too long."""
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a disk cannot be killed
                self._process.wait(_END_S)


class ProcessReads:
    """A `PageStore`: `get` by processes, and all other calls by the store itself."""

    max_read_processes = 0

    def __init__(
        self,
        store: PageStore,
        start: Callable[[], ReaderProcess],
        pool: HostMemory,
        number: int,
        *,
        clock: Clock | None = None,
    ) -> None:
        """`number`: processes to start."""
        self.max_readers: int | None = number
        self.max_writers = store.max_writers
        self._store = store
        self._start = start
        self._pool = pool
        self._number = number
        self._clock = clock or MonotonicClock()
        self._lock = threading.Lock()
        self._readers: list[ReaderProcess] = []  # all that have not died
        self._idle: list[ReaderProcess] = []  # of `_readers`; a call takes one, and puts it back
        self._ended = Done(num_pages=0, errors={}, num_hits=0, num_misses=0, num_broken=0)  # counts of dead readers
        self._num_deaths = 0
        self._restart_s = 0.0
        self._start_missing()

    @property
    def pids(self) -> list[int]:
        """The process ids of the readers."""
        with self._lock:
            return [reader.pid for reader in self._readers]

    def exists(self, keys: Sequence[bytes]) -> int:
        return self._store.exists(keys)

    def get(self, keys: Sequence[bytes], into: Sequence[memoryview]) -> int:
        offsets = [_address(page) - self._pool.address for page in into]
        is_in_pool = all(0 <= offset < self._pool.num_bytes for offset in offsets)
        reader = self._take() if is_in_pool else None
        if reader is not None:
            try:
                num_pages = reader.read(keys, offsets)
            except ReaderDied as error:
                self._bury(reader, error)
            except BaseException:
                self._put_back(reader)
                raise
            else:
                self._put_back(reader)
                return num_pages
        return self._store.get(keys, into)

    def put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        return self._store.put(keys, pages)

    def probe(self) -> None:
        self._store.probe()

    def stats(self) -> StoreStats:
        own = self._store.stats()
        with self._lock:
            counted = [self._ended, *(reader.counted for reader in self._readers)]
            deaths = {"reader_died": self._num_deaths} if self._num_deaths else {}
        errors = Counter(own.errors)
        for each in counted:
            errors.update(each.errors)
        return StoreStats(
            stored_bytes=own.stored_bytes,
            errors=errors | deaths,
            num_hits=own.num_hits + sum(each.num_hits for each in counted),
            num_misses=own.num_misses + sum(each.num_misses for each in counted),
            num_broken=own.num_broken + sum(each.num_broken for each in counted),
            num_written=own.num_written,
            num_refused=own.num_refused,
            num_evicted=own.num_evicted,
            watched_pool=own.watched_pool,
        )

    def close(self) -> None:
        with self._lock:
            readers, self._readers, self._idle = self._readers, [], []
            self._number = 0
        for reader in readers:
            reader.end()
        self._store.close()
        for reader in readers:
            reader.join()

    # ------------------------------------------------------------ the processes

    def _take(self) -> ReaderProcess | None:
        """Take an idle reader that has opened the store."""
        self._start_missing()
        with self._lock:
            candidates = [*self._idle]
        for reader in candidates:
            with self._lock:
                if reader not in self._idle:
                    continue
                self._idle.remove(reader)
            try:
                if reader.is_ready():
                    return reader
            except ReaderDied as error:
                self._bury(reader, error)
                continue
            self._put_back(reader)
        return None

    def _put_back(self, reader: ReaderProcess) -> None:
        with self._lock:
            self._idle.append(reader)

    def _start_missing(self) -> None:
        with self._lock:
            num_missing, now_s = self._number - len(self._readers), self._clock.now_s()
            if num_missing <= 0 or now_s < self._restart_s:
                return
            self._restart_s = now_s + RESTART_S
        started: list[ReaderProcess] = []
        try:
            for _ in range(num_missing):
                started.append(self._start())
        except OSError as error:
            logger.warning("a process that reads pages of the store cannot be started: %s", error)
        with self._lock:
            self._readers += started
            self._idle += started

    def _bury(self, reader: ReaderProcess, error: ReaderDied) -> None:
        logger.warning("a process that reads pages of the store has died (%s); its call is repeated here", error)
        with self._lock:
            self._readers.remove(reader)
            self._num_deaths += 1
            dead, sums = reader.counted, self._ended
            self._ended = Done(
                num_pages=0,
                errors=Counter(sums.errors) + Counter(dead.errors),
                num_hits=sums.num_hits + dead.num_hits,
                num_misses=sums.num_misses + dead.num_misses,
                num_broken=sums.num_broken + dead.num_broken,
            )
        reader.end()
        reader.join()


def _address(page: memoryview) -> int:
    return np.frombuffer(page, np.uint8).ctypes.data
