"""Clocks that stand still until a test or a simulation advances them."""

from __future__ import annotations


class FakeClock:
    """A monotonic clock. Mutable; advanced by the test alone, read by any thread."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, by_s: float) -> None:
        assert by_s >= 0, "time does not go back"
        self._now_s += by_s
