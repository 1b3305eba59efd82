"""Decides what an engine does next. Pure: `step(now_s, events) -> Plan`, without torch, sockets, clocks or threads.

    Submit ──► admission.py (refuse, queue) ──► batching.py (which requests run), allocation.py (pages) ──► Plan.batch
    StepFinished ──► results.py (tokens) ──► endings.py ──► Plan.chunks, Plan.ended
    Grant … Ack ──► handoff/ (source.py: prefill side, target.py: decode side) ──► Plan.messages, Plan.transfers
    states.py: every request, in the container of its state        context.py: values that all parts share

Every scheduler has both sides of a handoff; its role is the set of modes that it admits (`request.Role`). The engine
loop calls `step` with the events since the last call, carries out the plan in the order of its fields, and calls again
with the next events (the end of a batch is one of them), or at `wake_at_s`. The loop collects the reports of the
transport after it has carried out a plan and before the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvist.plan.events import Event
from kvist.plan.plan import Plan
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.status import SchedulerStatus
from kvist.scheduler.steps import build_scheduler

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStatus", "build_scheduler"]


class Scheduler(Protocol):
    def step(self, now_s: float, events: Sequence[Event], *, with_batch: bool = True) -> Plan:
        """Return the plan for the events since the last call. `now_s` never decreases. With `with_batch=False` the plan
        has no batch; the loop soon calls again to plan one."""

    def has_work(self) -> bool:
        """Return whether a request is live or a handoff is open."""

    def status(self) -> SchedulerStatus: ...
