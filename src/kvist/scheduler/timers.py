"""Deadlines by key, in a heap, so that the next one is found without a scan. This module reads no clock."""

from __future__ import annotations

import enum
import heapq


class TimerKind(enum.Enum):
    COMPILED = "compiled"  # a request waits for the grammar of its constraint
    QUEUE = "queue"  # a request waits for its first admission
    LEASE = "lease"  # the time of a leased prefix is over
    PREFETCH = "prefetch"  # a request waits for a prefetch from the store
    GRANT = "grant"  # prefill waits for the Grant
    EARLY_GRANT = "early grant"  # a Grant waits for its request
    ACK = "ack"  # prefill waits for the Ack of a computed request
    RESEND_DONE = "resend done"
    STORED = "stored"  # prefill waits until the pages of a prompt are stored
    DONE = "done"  # decode waits for the verified pages
    RESEND = "resend"  # decode sends Grant or Revoke again


TimerKey = tuple[TimerKind, str]  # kind; request id, handoff id or lease id


class Timers:
    """Mutable; its one owner is the scheduler. Setting a key again replaces its deadline."""

    def __init__(self) -> None:
        self._deadlines: dict[TimerKey, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, TimerKey]] = []  # an entry that differs from `_deadlines` is stale
        self._count = 0

    def set(self, kind: TimerKind, key: str, at_s: float) -> None:
        self._count += 1
        self._deadlines[kind, key] = (at_s, self._count)
        heapq.heappush(self._heap, (at_s, self._count, (kind, key)))
        if len(self._heap) > 2 * len(self._deadlines) + 64:
            self._heap = [(at, count, name) for name, (at, count) in self._deadlines.items()]
            heapq.heapify(self._heap)

    def cancel(self, kind: TimerKind, key: str) -> None:
        self._deadlines.pop((kind, key), None)

    def pop_due(self, now_s: float) -> TimerKey | None:
        """Remove and return one due timer, or None. Only one, because its handler may cancel the next one."""
        at_s = self.next_at_s()
        if at_s is None or at_s > now_s:
            return None
        name = heapq.heappop(self._heap)[2]
        del self._deadlines[name]
        return name

    def next_at_s(self) -> float | None:
        while self._heap:
            at_s, count, name = self._heap[0]
            if self._deadlines.get(name) == (at_s, count):
                return at_s
            heapq.heappop(self._heap)
        return None
