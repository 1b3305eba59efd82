"""The circuit breaker of a store: a store that hangs or fails is not called for a while. Each store has its own.

    closed ──a call hangs or raises──► open: no call ──pause──► half open: the store is probed
       ▲                                    ▲──────the probe hangs or raises──────┤
       └────────────────────────the probe returns in time─────────────────────────┘

Only a probe finds out whether the store answers again, so no request waits for a store that does not. A call that
returns too late does not close the breaker: the store may hang again at once.
"""

from __future__ import annotations

import enum

PAUSE_S = 5.0  # between two probes of a store that hangs


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Mutable; its owner guards it with a lock. `is_tried`: whether a call waits, or is under way and does not hang."""

    def __init__(self, pause_s: float = PAUSE_S) -> None:
        self._pause_s = pause_s
        self._retry_at_s: float | None = None  # None: closed

    def state(self, now_s: float, *, is_tried: bool) -> BreakerState:
        if self._retry_at_s is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if is_tried and now_s >= self._retry_at_s else BreakerState.OPEN

    @property
    def is_closed(self) -> bool:
        """Return whether the store may be called."""
        return self._retry_at_s is None

    def needs_probe(self, now_s: float, *, is_tried: bool) -> bool:
        """Return whether the store should be probed now."""
        return self._retry_at_s is not None and now_s >= self._retry_at_s and not is_tried

    def on_failure(self, now_s: float) -> None:
        """Open the breaker: a call has raised, or hangs."""
        self._retry_at_s = now_s + self._pause_s

    def on_success(self, now_s: float) -> bool:
        """Close the breaker, unless the pause is not over: a call has returned in time. Return whether it was closed
        now."""
        if self._retry_at_s is None or now_s < self._retry_at_s:
            return False
        self._retry_at_s = None
        return True
