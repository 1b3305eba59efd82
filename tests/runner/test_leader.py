"""Rank 0 sends a batch before it launches, and never waits for ever for a rank that has ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from kvist.errors import EngineError
from kvist.plan.batch import Batch, BatchItem
from kvist.plan.events import SampledTokens
from kvist.request import SlotId
from kvist.runner.batch_message import BatchDecoder
from kvist.runner.leader import LeadingRunner
from kvist.runner.tp import COLLECTIVE_TIMEOUT_S
from kvist.testing.clocks import FakeClock

ITEM = BatchItem(slot=SlotId(0), token_ids=(1, 2), start=0, page_ids=[0], samples=True)
BATCH = Batch(step_id=1, items=(ITEM,))
TOKENS = SampledTokens(token_ids=[9])


@dataclass
class FakeFollowers:
    order: list[str]
    sent: list[Batch] = field(default_factory=list)
    is_gone: bool = False
    looks: int = 0

    def __post_init__(self) -> None:
        self.decoder = BatchDecoder()

    def send(self, payload: bytes) -> None:
        self.check_alive()
        self.order.append("send")
        self.sent.append(self.decoder.decode(payload))

    def check_alive(self) -> None:
        self.looks += 1
        if self.is_gone:
            raise EngineError("tensor-parallel rank 1 ended with status -9")

    def close(self, *, kill: bool = False) -> None:
        self.order.append("kill" if kill else "let end")


@dataclass
class FakeFlight:
    world: World

    def is_done(self) -> bool:
        return self.world.on_poll()

    def result(self) -> SampledTokens:
        if self.world.fails_late:
            raise RuntimeError("an illegal memory access")
        return TOKENS


class World:
    """A leader with a runner and followers that the test controls."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.followers = FakeFollowers(self.order)
        self.clock = FakeClock()
        self.fails = self.fails_late = False
        self.polls_left = 3
        self.on_poll = self.count_down
        self.pool, self.pool_reason, self.attention_name = SimpleNamespace(), "enough", "fake"
        self.leader = LeadingRunner(self, self.followers, self.clock)  # type: ignore[arg-type]

    def count_down(self) -> bool:
        self.polls_left -= 1
        return self.polls_left < 0

    # the runner of rank 0

    def launch(self, batch: Batch) -> Any:
        self.order.append(f"launch {batch.step_id}")
        if self.fails:
            raise RuntimeError("out of memory")
        return FakeFlight(self)

    def settle(self) -> None:
        self.order.append("settle")

    def close(self) -> None:
        self.order.append("drop graphs")


@pytest.fixture
def world() -> World:
    return World()


def test_a_batch_is_sent_to_the_followers_before_rank_0_launches_it(world: World) -> None:
    assert world.leader.launch(BATCH).result() == TOKENS
    assert world.order == ["send", "launch 1"]
    assert [list(each.token_ids) for each in world.followers.sent[0].items] == [[1, 2]]
    assert world.leader.attention_name == "fake"


def test_a_follower_that_ends_during_a_step_ends_the_wait(world: World) -> None:
    def never() -> bool:
        world.followers.is_gone = world.followers.looks > 5
        return False

    launched = world.leader.launch(BATCH)
    world.on_poll = never
    with pytest.raises(EngineError, match="rank 1 ended with status -9"):
        launched.result()


def test_a_step_over_the_time_limit_ends_the_wait(world: World) -> None:
    def slow() -> bool:
        world.clock.advance(1.0)
        return False

    launched = world.leader.launch(BATCH)
    world.on_poll = slow
    with pytest.raises(EngineError, match="more than 120 s"):
        launched.result()
    assert COLLECTIVE_TIMEOUT_S <= world.clock.now_s() <= COLLECTIVE_TIMEOUT_S + 3


def test_is_done_raises_when_a_follower_has_ended(world: World) -> None:
    launched = world.leader.launch(BATCH)
    assert not launched.is_done()
    world.followers.is_gone = True
    with pytest.raises(EngineError, match="rank 1"):
        launched.is_done()


@pytest.mark.parametrize("when", ["launch", "result"])
def test_a_step_that_fails_only_at_rank_0_is_the_last(world: World, when: str) -> None:
    world.fails, world.fails_late = when == "launch", when == "result"
    with pytest.raises(EngineError, match=r"out of memory|illegal memory access"):
        world.leader.launch(BATCH).result()
    world.fails = world.fails_late = False
    with pytest.raises(EngineError, match=r"out of memory|illegal memory access"):
        world.leader.launch(BATCH).result()
    assert world.order.count("send") == 1, "followers must not receive a step that rank 0 does not run"


def test_a_failure_at_rank_0_is_attributed_to_a_follower_that_has_ended(world: World) -> None:
    launched = world.leader.launch(BATCH)
    world.polls_left, world.fails_late, world.followers.is_gone = 0, True, True
    with pytest.raises(EngineError, match="rank 1 ended"):
        launched.result()


def test_close_waits_for_the_last_step_and_drops_the_graphs_before_the_group(world: World) -> None:
    world.leader.launch(BATCH)
    world.leader.close()
    assert world.polls_left < 0
    assert world.order[2:] == ["drop graphs", "let end"]


def test_close_reads_the_step_before_the_last_one_which_may_wait_for_its_tokens(world: World) -> None:
    first, second = world.leader.launch(BATCH), world.leader.launch(BATCH)
    assert not first.is_done()
    assert not second.is_done()
    world.leader.close()
    assert world.order[4:] == ["settle", "drop graphs", "let end"]


def test_close_after_a_failed_step_does_not_wait(world: World) -> None:
    world.leader.launch(BATCH)
    world.followers.is_gone = True
    world.leader.close()
    assert world.order[2:] == ["kill", "drop graphs"]
