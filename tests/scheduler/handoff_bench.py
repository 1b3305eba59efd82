"""One scheduler under test, and the names shared by the tests of both sides of a handoff."""

from __future__ import annotations

from typing import Any

from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch
from kvist.plan.events import Event, SampledTokens, StepFinished
from kvist.plan.plan import Plan
from kvist.plan.slots import OpenSlots
from kvist.request import EpochId, HandoffId, Outcome, RequestId, Role, SampledToken
from kvist.scheduler import build_scheduler
from kvist.simulation.engine import LAYOUT, PAGE_BYTES, small_config
from kvist.testing.specs import make_peer_spec
from kvist.wire import PoolAddress

H = HandoffId("h")
D, P = EpochId("D#1"), EpochId("P#1")
PROMPT = list(range(10))  # 3 pages of 4 tokens, the last one half full
FIRST = SampledToken(token_id=5)


def pool(epoch: str, layout: str = LAYOUT) -> PoolAddress:
    return PoolAddress(transport="sim", location=epoch, num_pages=12, page_bytes=PAGE_BYTES, layout=layout)


class Bench:
    """One scheduler; the test plays the gateway, the peer and the device."""

    def __init__(self, role: Role, num_pages: int = 12, **config: Any) -> None:
        self.cache = PageCache(num_pages=num_pages, page_size=4, namespace="t")
        epoch = D if role is Role.DECODE else P
        self.scheduler = build_scheduler(role, small_config(**config), self.cache, epoch, make_peer_spec(pool(epoch)))
        self.now_s = 0.0
        self.plan = Plan()
        self.batch: Batch | None = None  # pending
        self.running: list[RequestId] = []  # the requests of the newest batch
        self._slots = OpenSlots()

    def step(self, *events: Event) -> Plan:
        self.plan = self.scheduler.step(self.now_s, events)
        if self.plan.batch is not None:
            self.batch = self.plan.batch
            self._slots.update(self.batch)
            self.running = self._slots.running(self.batch)
        return self.plan

    def finish(self, *events: Event, token_id: int = FIRST.token_id) -> Plan:
        """Step with the report of the pending batch, then `events`."""
        batch, self.batch = self.batch, None
        assert batch is not None
        sampled = SampledTokens(token_ids=[token_id for item in batch.items if item.samples])
        return self.step(StepFinished(step_id=batch.step_id, sampled=sampled), *events)

    @property
    def busy_pages(self) -> int:
        counts = self.scheduler.status().pages
        return counts.owned + counts.in_flight + counts.cached - counts.evictable


def messages(plan: Plan) -> list[object]:
    return [sent.message for sent in plan.messages]


def ends(plan: Plan) -> list[tuple[Outcome, str | None]]:
    return [(ended.outcome, ended.error_code) for ended in plan.ended]
