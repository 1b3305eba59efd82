"""`kvist store drain`: asks a store to move its pages to the other stores, and waits until it is empty."""

from __future__ import annotations

import time
from typing import Any

from kvist.clock import MonotonicClock
from kvist.errors import Timeout, Unavailable
from kvist.nodes.config import DrainOptions
from kvist.operate.calls import call
from kvist.operate.config import OperatedServer

POLL_S = 0.5
HTTP_TIMEOUT_S = 10.0
REPORT_S = 5.0


def run_drain(options: DrainOptions) -> int:
    """Empty the store; return 0 when it is empty. Raises `KvistError` if that fails or takes too long."""
    url = options.url
    server = OperatedServer(url=url, api_key=options.api_key)
    clock = MonotonicClock()
    deadline_s, reported_s = clock.now_s() + options.timeout_s, clock.now_s()
    progress = _asked(server, "POST")
    while not progress.get("done"):
        if progress.get("error"):
            raise Unavailable(f"{url} is not empty: {progress['error']}")
        if clock.now_s() > deadline_s:
            raise Timeout(
                f"{url} is not empty after {options.timeout_s:g} s ({_described(progress)}); the store goes "
                "on, and --timeout-s sets how long to wait"
            )
        if clock.now_s() > reported_s + REPORT_S:
            reported_s = clock.now_s()
            print(_described(progress), flush=True)
        time.sleep(POLL_S)
        progress = _asked(server, "GET")
    print(
        f"{progress.get('store')} is empty ({_described(progress)}). Stop the store now: it takes no new pages.",
        flush=True,
    )
    return 0


def _described(progress: dict[str, Any]) -> str:
    return (
        f"{progress.get('num_moved', 0)} pages moved from memory, {progress.get('num_moved_from_ssd', 0)} from the "
        f"SSD, {progress.get('num_waiting', 0)} wait for their readers or for room"
    )


def _asked(server: OperatedServer, method: str) -> dict[str, Any]:
    progress = call(server, method, "/drain", timeout_s=HTTP_TIMEOUT_S)
    if "state" not in progress:
        raise Unavailable(f"{server.url} is not a Kvist store")
    return progress
