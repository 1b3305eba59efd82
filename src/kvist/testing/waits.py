"""Waits for a condition: they end as soon as it holds, and fail after a minute, which is enough on a busy machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

WITHIN_S = 60.0
_SHORTEST_NAP_S, _LONGEST_NAP_S = 0.005, 0.05  # longer after a long wait: a condition may cost more than the nap


def _nap_s(waited_s: float) -> float:
    return min(max(waited_s / 20, _SHORTEST_NAP_S), _LONGEST_NAP_S)


async def until(condition: Callable[[], object], *, within_s: float = WITHIN_S) -> None:
    """Wait until the condition holds, while the event loop runs. Raises `TimeoutError`."""
    began_s = time.monotonic()
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(_nap_s(time.monotonic() - began_s))


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], str] = "", *, within_s: float = WITHIN_S
) -> float:
    """Wait until the condition holds; return the seconds. Raises `AssertionError` with `what` was waited for, or with
    what a function says about it at that time."""
    began_s = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - began_s
        if waited_s > within_s:
            raise AssertionError(f"not within {within_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(_nap_s(waited_s))
    return time.monotonic() - began_s
