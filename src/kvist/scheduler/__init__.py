"""Decides what an engine does next. Pure: `step(now_s, events) -> Plan`; no torch, no sockets, no clock, no threads.

    Arrived ──► requests.py (who may enter, tokens, endings) ──► batching.py (who runs, who gets pages) ──► Plan.batch
    Grant … Ack ──► source.py (prefill side), target.py (decode side) ──► Plan.messages, Plan.transfers

`build_scheduler` gives the one of a role. The worker loop calls `step` with what happened, carries the plan out in the
order of its fields, and calls again: at once with `StepFinished` or `StepFailed` if there was a batch, else when
something happens or `wake_at_s` comes. Transport reports are collected between carrying out one plan and the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.events import Event
from kvist.scheduler.load import SchedulerLoad
from kvist.scheduler.plan import Plan
from kvist.scheduler.roles import build_scheduler

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerLoad", "build_scheduler"]


class Scheduler(Protocol):
    def step(self, now_s: float, events: Sequence[Event], *, with_batch: bool = True) -> Plan:
        """What to do now, given what happened since the last call. `now_s` never goes back. Without a batch: the next
        call, which is near, plans one."""

    def has_work(self) -> bool:
        """A request is live or a handoff is open."""

    def load(self) -> SchedulerLoad: ...
