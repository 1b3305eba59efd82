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
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()

    def start(self, coroutine: Coroutine[object, object, T]) -> Future[T]:
        """Run the coroutine in the loop. Never waits. Raises `Unavailable` after `close`."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError as error:
            coroutine.close()
            raise Unavailable("the backend was closed while a program ran") from error

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(_STOP_S)
