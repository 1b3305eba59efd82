"""`python -m kvist.page_readers.process`: one reader process. Its standard input is the socket to the engine.

    Setup ─► map the pool, open the store ─► Opened ─► Read ─► Done ─► … ─► end of the socket: the engine has ended

Signals that reach the whole process group are ignored: the engine decides when a reader ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import traceback
from pathlib import Path

from kvist.errors import KvistError, StoreUnreachable
from kvist.log import LogConfig, setup_logging
from kvist.page_readers.messages import (
    MAX_MESSAGE_BYTES,
    Answer,
    Done,
    Failed,
    Opened,
    Setup,
    decode_read,
    decode_setup,
    encode,
)
from kvist.parent import continue_when_parent_dies
from kvist.store import STORES
from kvist.store.backend import HostMemory, StoreContext


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    setup_logging(LogConfig())
    continue_when_parent_dies()
    with socket.socket(fileno=os.dup(0)) as engine:
        message, fds, _, _ = socket.recv_fds(engine, MAX_MESSAGE_BYTES, 1)
        if not message:
            return
        try:
            reader = _Reader(decode_setup(message), fds[0])
        except Exception as error:  # the engine must get an answer
            engine.send(encode(_failure(error)))
            return
        answer: Answer = Opened()
        while True:
            engine.send(encode(answer))
            message = engine.recv(MAX_MESSAGE_BYTES)
            if not message:
                return
            answer = reader.answer(message)


class _Reader:
    """An open store, and the pool as this process maps it."""

    def __init__(self, setup: Setup, fd: int) -> None:
        memory = mmap.mmap(fd, setup.num_bytes)
        os.close(fd)
        self._pool = memoryview(memory)
        self._page_bytes = setup.page_bytes
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        context = StoreContext(
            namespace=setup.namespace,
            page_bytes=setup.page_bytes,
            host_memory=HostMemory(address=address, num_bytes=setup.num_bytes),
            advertised_host=setup.advertised_host,
            secret_path=None if setup.secret_path is None else Path(setup.secret_path),
            only_reads=True,
        )
        self._store = STORES[setup.backend].make(setup.options, context)

    def answer(self, message: bytes) -> Answer:
        try:
            read = decode_read(message)
            into = [self._pool[offset : offset + self._page_bytes] for offset in read.offsets]
            num_pages = self._store.get(read.keys, into)
            stats = self._store.stats()
        except Exception as error:
            return _failure(error)
        return Done(
            num_pages=num_pages,
            errors=stats.errors,
            num_hits=stats.num_hits,
            num_misses=stats.num_misses,
            num_broken=stats.num_broken,
        )


def _failure(error: Exception) -> Failed:
    message = error.message if isinstance(error, KvistError) else "".join(traceback.format_exception(error))
    return Failed(message=message[-MAX_MESSAGE_BYTES // 4 :], unreachable=isinstance(error, StoreUnreachable))


if __name__ == "__main__":
    main()
