"""Keeps the state of a Mooncake pool at hand: a thread asks the master, and readers get its last answer at once.

watch = PoolWatch("http://HOST:9003")
watch.latest()      never waits; `status` is None before the first answer
watch.close()
"""

from __future__ import annotations

import threading

from kvist.clock import Clock, MonotonicClock
from kvist.errors import KvistError
from kvist.mooncake.master_admin import MasterAdmin
from kvist.pool_status import PoolStatus, WatchedPool

INTERVAL_S = 2.0
TIMEOUT_S = 2.0


class PoolWatch:
    """Thread-safe. The thread is a daemon, and ends with `close` or with the process."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        interval_s: float = INTERVAL_S,
        clock: Clock | None = None,
    ) -> None:
        self._admin = MasterAdmin(url, api_key=api_key, timeout_s=TIMEOUT_S)
        self._interval_s = interval_s
        self._clock = clock or MonotonicClock()
        self._status: PoolStatus | None = None
        self._answered_s = 0.0
        self._problem = ""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pool-watch", daemon=True)
        self._thread.start()

    def latest(self) -> WatchedPool:
        """Return the last answer. Never waits for the master."""
        with self._lock:
            age_s = None if self._status is None else self._clock.now_s() - self._answered_s
            return WatchedPool(master=self._admin.url, status=self._status, age_s=age_s, problem=self._problem)

    def close(self) -> None:
        """End the thread; returns at once, also while the master does not answer."""
        self._closing.set()

    def _watch(self) -> None:
        while True:
            status, problem = self._ask()
            with self._lock:
                self._problem = problem
                if status is not None:
                    self._status, self._answered_s = status, self._clock.now_s()
            if self._closing.wait(self._interval_s):
                self._admin.close()
                return

    def _ask(self) -> tuple[PoolStatus | None, str]:
        try:
            return self._admin.pool_status(), ""
        except KvistError as error:
            return None, error.message
