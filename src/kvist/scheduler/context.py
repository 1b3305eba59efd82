"""The values that all parts of one scheduler share: settings, the time of the step, timers, outbox and counters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvist.plan.events import RoleChanged
from kvist.request import Mode, Role
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.counters import SCHEDULER_COUNTERS
from kvist.scheduler.outbox import Outbox
from kvist.scheduler.timers import Timers
from kvist.service_time import PromptRate, ServiceTime


@dataclass(slots=True, eq=False, kw_only=True)
class SchedulerContext:
    """Mutable; its one owner is the scheduler, which sets `now_s` and `step_count` at the start of each step."""

    config: SchedulerConfig
    role: Role
    modes: frozenset[Mode]  # of new requests
    context_len: int  # the most tokens of one request
    now_s: float = 0.0
    step_count: int = 0
    timers: Timers = field(default_factory=Timers)
    out: Outbox = field(default_factory=Outbox)
    num_begun_tokens: int = 0  # of running prompts, in no step when the last batch was planned
    lacks_pages: bool = False  # a request found too few pages when the last batch was planned
    prompt_rate: PromptRate = field(default_factory=PromptRate)
    service_time: ServiceTime = field(default_factory=ServiceTime)
    totals: dict[str, float] = field(default_factory=SCHEDULER_COUNTERS.zeros)

    def on_role_changed(self, event: RoleChanged) -> None:
        self.role, self.modes = event.role, event.modes
        if event.usual_step_tokens is not None:
            self.config = replace(self.config, chunked_prefill_size=event.usual_step_tokens)

    def count(self, name: str, amount: float = 1) -> None:
        """Increase one of SCHEDULER_COUNTERS."""
        self.totals[name] += amount
