"""A worker that reads prompts and writes answers (FULL), and prefills for decode workers (PREFILL) when asked to."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.kv.cache import PageCache
from kvist.request import EpochId, Mode
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.events import Arrived, Event
from kvist.scheduler.load import SchedulerLoad
from kvist.scheduler.plan import Plan
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.source import SourceHalf
from kvist.scheduler.steps import Steps
from kvist.wire import PoolAddress


class UnifiedScheduler:
    def __init__(self, config: SchedulerConfig, cache: PageCache, *, epoch: EpochId, pool: PoolAddress) -> None:
        table = RequestTable(config, cache, refuse_mode=_refuse_mode)
        source = SourceHalf(table, epoch=epoch, pool=pool)
        self._steps = Steps(table, source, source.handlers())

    def step(self, now_s: float, events: Sequence[Event]) -> Plan:
        return self._steps.step(now_s, events)

    def has_work(self) -> bool:
        return self._steps.has_work()

    def load(self) -> SchedulerLoad:
        return self._steps.load()


def _refuse_mode(event: Arrived) -> str | None:
    if event.mode is Mode.DECODE:
        return "this worker is unified: it cannot take over pages; send decode requests to a decode worker"
    return None
