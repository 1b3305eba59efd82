from __future__ import annotations

import asyncio
import contextlib

from kvist.server.serve import watch_loop_lag
from kvist.testing.clocks import FakeClock


async def test_the_loop_watch_reports_the_lag_of_the_event_loop() -> None:
    clock, lags_s = FakeClock(), list[float]()
    watch = asyncio.create_task(watch_loop_lag(lags_s.append, clock))
    await asyncio.sleep(0)
    clock.advance(3.1)  # while the watch slept for a tenth of a second
    while not lags_s:
        await asyncio.sleep(0.01)
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    assert round(lags_s[0], 6) == 3.0
