"""The values that all parts of one scheduler share: settings, the time of the step, timers, outbox and counters."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvist.request import Role
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.counters import SCHEDULER_COUNTERS
from kvist.scheduler.outbox import Outbox
from kvist.scheduler.timers import Timers
from kvist.service_time import ServiceTime


@dataclass(slots=True, eq=False, kw_only=True)
class SchedulerContext:
    """Mutable; its one owner is the scheduler, which sets `now_s` and `step_count` at the start of each step."""

    config: SchedulerConfig
    role: Role  # read at each Submit, so that it may change
    context_len: int  # the most tokens of one request
    now_s: float = 0.0
    step_count: int = 0
    timers: Timers = field(default_factory=Timers)
    out: Outbox = field(default_factory=Outbox)
    service_time: ServiceTime = field(default_factory=ServiceTime)
    totals: dict[str, float] = field(default_factory=SCHEDULER_COUNTERS.zeros)

    def count(self, name: str, amount: float = 1) -> None:
        """Increase one of SCHEDULER_COUNTERS."""
        self.totals[name] += amount
