"""A network between two processes that a test can cut, delay, or turn into a black hole; needs no rights.

    with TcpRelay(listen=("127.0.0.2", 8000), target=("127.0.0.1", 8000)) as relay:
        relay.set(Link.BLACK_HOLE)

The relay accepts TCP connections and passes their bytes on. On Linux every address of 127.0.0.0/8 is the loopback
interface, so a relay can use the target's port on another address: a server that advertises the address of the relay
is reached through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from typing import Self

_CHUNK_BYTES = 1 << 16
_CLOSE_TIMEOUT_S = 10.0
_AT_ONCE = struct.pack("ii", 1, 0)  # closing sends a reset, not the end of the stream
_Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Link(enum.Enum):
    OPEN = "open"
    BLACK_HOLE = "black hole"  # bytes and new connections wait until the link is open again; nothing is closed
    CUT = "cut"  # connections are reset, and new ones too


class TcpRelay:
    """Use as a context manager. Owns a thread with an event loop; `set` may be called from any thread."""

    def __init__(self, *, listen: tuple[str, int], target: tuple[str, int]) -> None:
        """`listen` and `target`: (host, port). Raises `OSError` on entry if it cannot listen."""
        self._listen, self._target = listen, target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp relay", daemon=True)
        self._passes = asyncio.Event()
        self._passes.set()
        self._is_cut = False
        self._delay_s = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._call(self._open())
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._end_loop()

    def set(self, link: Link, *, delay_s: float = 0.0) -> None:
        """Change the link for all connections; return when the change is made. `delay_s`: of every piece of bytes, in
        each direction."""
        self._call(self._set(link, delay_s))

    # ------------------------------------------------------------ in the thread

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, *self._listen)

    async def _set(self, link: Link, delay_s: float) -> None:
        self._delay_s = delay_s
        self._is_cut = link is Link.CUT
        if link is Link.BLACK_HOLE:
            self._passes.clear()
        else:
            self._passes.set()
        if self._is_cut:
            self._reset_all()

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        self._passes.set()
        self._reset_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _reset_all(self) -> None:
        for writer in self._writers:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._passes.wait()
            if self._is_cut:
                self._reset_all()
                return
            inner = await asyncio.open_connection(*self._target)
            self._writers.add(inner[1])
            try:
                await self._pass_both((reader, writer), inner)
            finally:
                self._writers.discard(inner[1])
                inner[1].transport.abort()
        except OSError:  # the target does not listen, or an end was reset
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass_both(self, outer: _Ends, inner: _Ends) -> None:
        """Pass bytes on until either end is closed."""
        ways = {
            asyncio.create_task(self._pass(outer[0], inner[1])),
            asyncio.create_task(self._pass(inner[0], outer[1])),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            piece = await reader.read(_CHUNK_BYTES)
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._passes.wait()  # a black hole hides the end of a connection, too
            if not piece:
                with contextlib.suppress(OSError):
                    await writer.drain()
                return
            writer.write(piece)
            await writer.drain()

    # ------------------------------------------------------------ in any thread

    def _call(self, coroutine: object) -> None:
        assert asyncio.iscoroutine(coroutine)
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_CLOSE_TIMEOUT_S)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._loop.close()
