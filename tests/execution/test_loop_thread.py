"""The event loop of programs that are plain functions, and its end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvist.errors import Unavailable
from kvist.execution.loop_thread import LoopThread

LIMIT_S = 30.0


async def _three() -> int:
    await asyncio.sleep(0)
    return 3


def test_a_coroutine_that_is_started_while_the_loop_stops_still_ends() -> None:
    thread, hold = LoopThread("test"), threading.Event()
    thread.loop.call_soon_threadsafe(hold.wait, LIMIT_S)
    thread.loop.call_soon_threadsafe(thread.loop.stop)
    late = thread.start(_three())  # after the stop, in the loop's order
    hold.set()
    assert late.result(LIMIT_S) == 3
    thread._thread.join(LIMIT_S)
    with pytest.raises(Unavailable, match="was closed"):
        thread.start(_three())
