"""How many requests a client has out at once: additive increase, multiplicative decrease on the time in queues.

The rule is that of TCP's congestion control (Chiu and Jain, 1989): it finds the width at which the cluster is busy and
its queues are short, and shares the cluster fairly with other clients that follow it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_DECREASE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """Immutable: each answer of the server gives the next width."""

    limit: float = 64.0
    least: int = 1
    most: int = 256
    target_queue_s: float = 0.5
    num_since_decrease: int = 0  # answers: a queue is felt by all that are in it, and counts once

    @property
    def requests(self) -> int:
        return int(self.limit)

    def after_answer(self, queue_s: float) -> Width:
        """Return the width after an answer whose request waited `queue_s` in a queue."""
        if queue_s > self.target_queue_s:
            return self._decreased()
        grown = min(self.limit + 1 / max(self.limit, 1.0), float(self.most))
        return replace(self, limit=grown, num_since_decrease=self.num_since_decrease + 1)

    def after_refusal(self) -> Width:
        """Return the width after the server refused a request because it is overloaded."""
        return self._decreased()

    def _decreased(self) -> Width:
        if 0 < self.num_since_decrease < self.limit:
            return replace(self, num_since_decrease=self.num_since_decrease + 1)
        return replace(self, limit=max(self.limit * _DECREASE, float(self.least)), num_since_decrease=1)
