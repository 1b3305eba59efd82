"""A worker that takes over prompts that others have read, and writes their answers."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.kv.cache import PageCache
from kvist.request import EpochId, Mode
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.events import Arrived, Event
from kvist.scheduler.load import SchedulerLoad
from kvist.scheduler.plan import Plan
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.steps import Steps
from kvist.scheduler.target import TargetHalf
from kvist.wire import PoolAddress


class DecodeScheduler:
    def __init__(self, config: SchedulerConfig, cache: PageCache, *, epoch: EpochId, pool: PoolAddress) -> None:
        table = RequestTable(config, cache, refuse_mode=_refuse_mode)
        target = TargetHalf(table, epoch=epoch, pool=pool)
        self._steps = Steps(table, target, target.handlers())

    def step(self, now_s: float, events: Sequence[Event]) -> Plan:
        return self._steps.step(now_s, events)

    def has_work(self) -> bool:
        return self._steps.has_work()

    def load(self) -> SchedulerLoad:
        return self._steps.load()


def _refuse_mode(event: Arrived) -> str | None:
    if event.mode is Mode.DECODE:
        return None
    return "this is a decode worker: it does not read prompts; send the request to the router"
