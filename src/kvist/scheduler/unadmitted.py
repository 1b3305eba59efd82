"""Counts the live requests that were never admitted, by priority and caller: who is ahead, and who is displaced."""

from __future__ import annotations

from kvist.fairness import CallerCounts, CallerPath
from kvist.scheduler.active import ActiveRequest


class Unadmitted:
    """Mutable; its one owner is `Requests`."""

    def __init__(self) -> None:
        self._counts: dict[int, CallerCounts] = {}  # by priority; none is empty
        self.num_tokens = 0  # to be computed here for all these requests

    def __len__(self) -> int:
        return sum(map(len, self._counts.values()))

    def add(self, request: ActiveRequest) -> None:
        self.num_tokens += request.num_uncomputed
        self._counts.setdefault(request.priority, CallerCounts()).add(request.caller)

    def remove(self, request: ActiveRequest) -> None:
        self.num_tokens -= request.num_uncomputed
        counts = self._counts[request.priority]
        counts.remove(request.caller)
        if not len(counts):
            del self._counts[request.priority]

    def displaced_by(self, newcomer: ActiveRequest) -> tuple[int, CallerPath] | None:
        """Return the priority and the caller that lose a place to the newcomer; None if it displaces no one.

        Requests of a higher `priority` value are displaced, the highest first; otherwise callers with more requests of
        the newcomer's own priority (fairness.py)."""
        last = max(self._counts, default=newcomer.priority)
        if last > newcomer.priority:
            caller = self._counts[last].heaviest()
        else:
            counts = self._counts.get(newcomer.priority)
            caller = None if counts is None else counts.displaced_by(newcomer.caller)
        return None if caller is None else (max(last, newcomer.priority), caller)

    def num_ahead(self, newcomer: ActiveRequest) -> int:
        """Return how many of these requests have their turn before the newcomer."""
        sooner = sum(len(counts) for priority, counts in self._counts.items() if priority < newcomer.priority)
        counts = self._counts.get(newcomer.priority)
        return sooner + (0 if counts is None else counts.num_ahead(newcomer.caller))
