"""A worker that reads prompts for decode workers. A whole request is its affair only when one token is all it asks."""

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


class PrefillScheduler:
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
    if event.mode is Mode.PREFILL or (event.mode is Mode.FULL and event.request.sampling.max_tokens == 1):
        return None
    return "this is a prefill worker: it reads prompts and writes one token; send the rest to a decode worker"
