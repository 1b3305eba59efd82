"""The values that both sides of a handoff use: requests, endings, timers, and the engine itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from kvist.kv.cache import PageCache
from kvist.request import EpochId, HandoffId
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.endings import Endings
from kvist.scheduler.handoff.memory import ExpiringMap
from kvist.scheduler.states import Requests
from kvist.scheduler.timers import TimerKind
from kvist.wire import PeerSpec

V = TypeVar("V")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideParts:
    context: SchedulerContext
    requests: Requests
    cache: PageCache
    endings: Endings
    epoch: EpochId  # of this engine
    own: PeerSpec  # this engine, as its peers see it

    def set_timer(self, kind: TimerKind, handoff_id: HandoffId, after_s: float) -> None:
        self.context.timers.set(kind, handoff_id, self.context.now_s + after_s)

    def cancel_timers(self, handoff_id: HandoffId, *kinds: TimerKind) -> None:
        for kind in kinds:
            self.context.timers.cancel(kind, handoff_id)

    def closed_handoffs(self) -> ExpiringMap[HandoffId, V]:
        """Return an empty map for closed handoffs. An entry is kept for as long as late messages may arrive."""
        config = self.context.config
        max_age_s = 2 * config.handoff_timeout_s + config.grant_timeout_s
        return ExpiringMap(capacity=config.max_remembered_handoffs, max_age_s=max_age_s)
