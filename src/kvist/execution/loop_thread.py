"""An event loop in a thread of its own, for programs that are plain functions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TypeVar

from kvist.errors import Unavailable

T = TypeVar("T")

_STOP_S = 5.0


class LoopThread:
    """Mutable; `close` ends the thread, which also ends with the process."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        with self._lock:
            self._closed = True
        self.loop.run_until_complete(self._rest())  # what other threads had started when the loop stopped
        self.loop.close()

    async def _rest(self) -> None:
        await asyncio.sleep(0)  # a coroutine from another thread becomes a task in the loop's next turn
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            _, late = await asyncio.wait(tasks, timeout=_STOP_S)
            for task in late:
                task.cancel()

    def start(self, coroutine: Coroutine[object, object, T]) -> Future[T]:
        """Run the coroutine in the loop. Never waits. Raises `Unavailable` after `close`."""
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        coroutine.close()
        raise Unavailable("the backend was closed while a program ran")

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(2 * _STOP_S)
