"""A queue in which handoffs take turns: after a job, or a part of a large one, comes the next handoff.

A small handoff is thus not delayed by all the jobs of a large one, only by one turn of each handoff that waits too. The
jobs of one handoff keep their order. The caller carries out the turns, and holds a lock during each call.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

from kvist.request import HandoffId

JobT = TypeVar("JobT")


class Turns(Generic[JobT]):
    """Mutable; guarded by its owner's lock."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[HandoffId, deque[JobT]] = OrderedDict()  # the next turn first; no empty queue

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, handoff_id: HandoffId, job: JobT) -> None:
        self._waiting.setdefault(handoff_id, deque()).append(job)

    def next(self) -> tuple[HandoffId, JobT]:
        """Return the job whose turn it is. The job stays in the queue until `end_turn`."""
        handoff_id = next(iter(self._waiting))
        return handoff_id, self._waiting[handoff_id][0]

    def end_turn(self, handoff_id: HandoffId, job: JobT, *, is_done: bool) -> bool:
        """End the turn that `next` gave. `is_done`: nothing of the job is left. Return whether the job left the queue
        now; it may have been removed before."""
        queue = self._waiting.get(handoff_id)
        if queue is None:
            return False
        leaves = is_done and queue[0] is job
        if leaves:
            queue.popleft()
        if queue:
            self._waiting.move_to_end(handoff_id)
        else:
            del self._waiting[handoff_id]
        return leaves

    def remove(self, handoff_id: HandoffId, is_unneeded: Callable[[JobT], bool]) -> list[JobT]:
        """Remove jobs of a handoff, and return them."""
        queue = self._waiting.pop(handoff_id, deque())
        kept = deque(job for job in queue if not is_unneeded(job))
        if kept:
            self._waiting[handoff_id] = kept
        return [job for job in queue if is_unneeded(job)]

    def clear(self) -> None:
        self._waiting.clear()
