"""No engine computes for a client that left before its first token: on a CPU not even the rest of the step."""

from __future__ import annotations

import pytest

from kvist import wire
from kvist.channel.engine import Inbound
from kvist.kv.cache import PageCache
from kvist.request import (
    EpochId,
    Outcome,
    RequestId,
    Role,
)
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.clocks import FakeClock
from kvist.testing.loop_bench import LoopBench, SlowRunner
from kvist.testing.specs import make_peer_spec, make_pool, make_request, make_spec, submit_full

GATEWAY, STRANGER = b"gateway", b"stranger"
LAYER_S, NUM_LAYERS = 0.04, 30


class Engine(LoopBench):
    """A loop around a real scheduler and a runner whose step takes 1.2 s, with a check before each layer."""

    def __init__(self) -> None:
        clock = FakeClock(1.0)
        cache = PageCache(num_pages=2048, page_size=4, namespace="t")
        config = SchedulerConfig(max_running_requests=64, chunked_prefill_size=512, max_prefill_tokens=512)
        self.real_scheduler = build_scheduler(
            Role.UNIFIED, config, cache, EpochId("e"), make_peer_spec(make_pool(num_pages=2048))
        )
        self.slow_runner = SlowRunner(clock, layer_s=LAYER_S, num_layers=NUM_LAYERS)
        super().__init__(
            spec=make_spec(
                max_model_len=4096, page_size=4, num_pages=2048, max_running_requests=64, max_queued_requests=64
            ),
            scheduler=self.real_scheduler,
            runner=self.slow_runner,
            clock=clock,
            gateway_timeout_s=1e9,
        )
        self.slow_runner.between_layers = self.loop.between_layers

    def at(self, at_s: float, message: Inbound, identity: bytes = GATEWAY) -> None:
        self.channel.deliver(identity, message, at_s=at_s)

    def ended(self) -> list[tuple[float, str, Outcome]]:
        return [
            (sent.at_s, ended.request_id, ended.outcome)
            for sent in self.channel.sent
            if isinstance(sent.message, wire.StepOutputs)
            for ended in sent.message.ended
        ]

    def num_aborted_steps(self) -> float:
        """Return the number of aborted steps, as in the next load report."""
        self.clock.advance(2.0)
        self.loop.iterate(0.0)
        return self.sent(wire.LoadReport)[-1].totals["abandoned_steps"]


def prompt(name: str, num_tokens: int) -> wire.Submit:
    tokens = tuple((len(name) + index) % 100 for index in range(num_tokens))
    return submit_full(make_request(name, tokens))


def left(name: str) -> wire.Abort:
    return wire.Abort(request_id=RequestId(name))


@pytest.mark.case("cancel-in-prefill")
@pytest.mark.parametrize("after_s", [0.2, 0.7, 1.15, 3.0])
def test_a_step_without_a_client_is_abandoned_within_100_ms_and_the_next_prompt_starts(after_s: float) -> None:
    engine = Engine()
    engine.at(0.0, prompt("long", 3000))
    engine.at(1.0 + after_s, left("long"))
    engine.at(1.0 + after_s, prompt("next", 20))
    while len(engine.slow_runner.began) < 1 or engine.slow_runner.began[-1][1] != ["next"]:
        engine.loop.iterate(0.0)
    ((ended_s, name, outcome),) = engine.ended()
    assert (name, outcome) == ("long", Outcome.ABORTED)
    assert ended_s - (1.0 + after_s) < 0.1
    assert engine.slow_runner.began[-1][0] - (1.0 + after_s) < 0.1
    assert engine.num_aborted_steps() == 1
    totals = engine.real_scheduler.status().totals
    assert (totals["requests_aborted"], totals["requests_failed"]) == (1, 0)


@pytest.mark.case("cancel-in-prefill")
def test_the_pages_of_forty_clients_that_leave_at_once_are_freed_together() -> None:
    engine = Engine()
    for index in range(40):
        engine.at(0.0, prompt(f"long{index}", 3000 - index))
        engine.at(3.5, left(f"long{index}"))
    while len(engine.ended()) < 40:
        engine.loop.iterate(0.0)
    assert max(at_s for at_s, _, _ in engine.ended()) < 3.6
    engine.loop.iterate(0.0)
    load = engine.real_scheduler.status()
    assert (load.num_running, load.num_waiting, load.pages.owned) == (0, 0, 0)


@pytest.mark.case("cancel-in-prefill")
def test_a_step_with_one_client_left_goes_on_and_aborted_requests_end_at_once() -> None:
    engine = Engine()
    engine.at(0.0, prompt("leaves", 100))
    engine.at(0.0, prompt("stays", 100))
    engine.at(1.5, left("leaves"))
    engine.at(1.5, left("stays"), STRANGER)
    engine.loop.iterate(0.0)
    engine.loop.iterate(0.0)
    assert engine.num_aborted_steps() == 0
    ((ended_s, name, _),) = engine.ended()
    assert name == "leaves"
    assert 1.5 <= ended_s <= 1.5 + LAYER_S
    outputs_sent = engine.sent(wire.StepOutputs)
    assert "stays" in {chunk.request_id for outputs in outputs_sent for chunk in outputs.chunks}
