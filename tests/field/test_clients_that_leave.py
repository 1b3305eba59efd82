"""No engine computes for a client that left before its first token: on a CPU not even the rest of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from kvist import wire
from kvist.channel.engine import Inbound, Outbound
from kvist.engine.loop import EngineLoop, LoopParts
from kvist.engine.reports import LoadReports
from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch
from kvist.plan.events import SampledTokens
from kvist.plan.slots import OpenSlots
from kvist.plan.transfers import VerifyPages, WritePages
from kvist.request import (
    EngineRequest,
    EpochId,
    HandoffId,
    Mode,
    Outcome,
    RequestId,
    Role,
    SamplingParams,
)
from kvist.scheduler import Scheduler, SchedulerConfig, build_scheduler
from kvist.testing.clocks import FakeClock
from kvist.testing.specs import make_spec
from kvist.transfer import TransferReport

GATEWAY, STRANGER = b"gateway", b"stranger"
LAYER_S, NUM_LAYERS = 0.04, 30


@dataclass
class Wire:
    """A fake channel: messages that arrive at given times, and the sent messages."""

    clock: FakeClock
    coming: list[tuple[float, bytes, Inbound]] = field(default_factory=list)
    sent: list[tuple[float, Outbound]] = field(default_factory=list)
    num_undecodable: int = 0
    num_unexpected: int = 0
    num_refused: int = 0

    def recv(self, timeout_s: float) -> list[tuple[bytes, Inbound]]:  # noqa: ARG002 (a test does not sleep)
        now_s = self.clock.now_s()
        come = [(identity, message) for at_s, identity, message in self.coming if at_s <= now_s]
        self.coming = [each for each in self.coming if each[0] > now_s]
        return come

    def send(self, identity: bytes, message: Outbound) -> bool:
        assert identity in (GATEWAY, STRANGER)
        self.sent.append((self.clock.now_s(), message))
        return True

    def send_to_peer(self, endpoint: str, message: wire.TargetToSource) -> bool:
        raise AssertionError(f"no peer here: {endpoint}, {message}")

    def wakeup(self) -> None: ...

    def ended(self) -> list[tuple[float, str, Outcome]]:
        return [
            (at_s, ended.request_id, ended.outcome)
            for at_s, message in self.sent
            if isinstance(message, wire.StepOutputs)
            for ended in message.ended
        ]


class SlowRunner:
    """A runner whose step takes 1.2 s, with a check before each layer."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.between_layers: Callable[[], None] = lambda: None
        self.began: list[tuple[float, Sequence[str]]] = []
        self.slots = OpenSlots()

    def launch(self, batch: Batch) -> SlowRunner:
        self.slots.update(batch)
        self.began.append((self.clock.now_s(), self.slots.running(batch)))
        self.num_sampled = sum(item.samples for item in batch.items)
        for _ in range(NUM_LAYERS):
            self.between_layers()
            self.clock.advance(LAYER_S)
        return self

    def result(self) -> SampledTokens:
        return SampledTokens(token_ids=[7] * self.num_sampled)


class NoTransport:
    def write(self, job: WritePages) -> None: ...
    def verify(self, job: VerifyPages) -> None: ...
    def stop(self, handoff_id: HandoffId) -> None: ...
    def poll(self) -> list[TransferReport]:
        return []

    def peer_is_dead(self, epoch: EpochId) -> bool:  # noqa: ARG002
        return False

    def close(self) -> None: ...


class Engine:
    def __init__(self) -> None:
        self.clock = FakeClock(1.0)
        self.wire, self.runner = Wire(self.clock), SlowRunner(self.clock)
        cache = PageCache(num_pages=2048, page_size=4, namespace="t")
        config = SchedulerConfig(max_running_requests=64, chunked_prefill_size=512, max_prefill_tokens=512)
        pool = wire.PoolAddress(transport="t", location="x", num_pages=2048, page_bytes=64, layout="l")
        self.scheduler: Scheduler = build_scheduler(Role.UNIFIED, config, cache, EpochId("e"), pool)
        parts = LoopParts(
            spec=_SPEC,
            scheduler=self.scheduler,
            runner=self.runner,
            channel=self.wire,
            transport=NoTransport(),
            reports=LoadReports(snapshot=tuple),
            clock=self.clock,
            gateway_timeout_s=1e9,
        )
        self.loop = EngineLoop(parts)
        self.runner.between_layers = self.loop.between_layers

    def at(self, at_s: float, message: Inbound, identity: bytes = GATEWAY) -> None:
        self.wire.coming.append((at_s, identity, message))


_SPEC = make_spec(max_model_len=4096, page_size=4, num_pages=2048, max_running_requests=64, max_queued_requests=64)


def prompt(name: str, num_tokens: int) -> wire.Submit:
    tokens = tuple((len(name) + index) % 100 for index in range(num_tokens))
    request = EngineRequest(request_id=RequestId(name), prompt_token_ids=tokens, sampling=SamplingParams(max_tokens=4))
    return wire.Submit(request=request, mode=Mode.FULL)


def left(name: str) -> wire.Abort:
    return wire.Abort(request_id=RequestId(name))


@pytest.mark.case("cancel-in-prefill")
@pytest.mark.parametrize("after_s", [0.2, 0.7, 1.15, 3.0])
def test_a_step_without_a_client_is_abandoned_within_100_ms_and_the_next_prompt_starts(after_s: float) -> None:
    engine = Engine()
    engine.at(0.0, prompt("long", 3000))
    engine.at(1.0 + after_s, left("long"))
    engine.at(1.0 + after_s, prompt("next", 20))
    while len(engine.runner.began) < 1 or engine.runner.began[-1][1] != ["next"]:
        engine.loop.iterate(0.0)
    ((ended_s, name, outcome),) = engine.wire.ended()
    assert (name, outcome) == ("long", Outcome.ABORTED)
    assert ended_s - (1.0 + after_s) < 0.1
    assert engine.runner.began[-1][0] - (1.0 + after_s) < 0.1
    assert engine.loop._abandonment.num_abandoned == 1
    totals = engine.scheduler.load().totals
    assert (totals["requests_aborted"], totals["requests_failed"]) == (1, 0)


@pytest.mark.case("cancel-in-prefill")
def test_the_pages_of_forty_clients_that_leave_at_once_are_freed_together() -> None:
    engine = Engine()
    for index in range(40):
        engine.at(0.0, prompt(f"long{index}", 3000 - index))
        engine.at(3.5, left(f"long{index}"))
    while len(engine.wire.ended()) < 40:
        engine.loop.iterate(0.0)
    assert max(at_s for at_s, _, _ in engine.wire.ended()) < 3.6
    engine.loop.iterate(0.0)
    load = engine.scheduler.load()
    assert (load.num_running, load.num_waiting, load.pages.owned) == (0, 0, 0)


@pytest.mark.case("cancel-in-prefill")
def test_a_step_with_one_client_left_goes_on_and_aborted_requests_end_with_it() -> None:
    engine = Engine()
    engine.at(0.0, prompt("leaves", 100))
    engine.at(0.0, prompt("stays", 100))
    engine.at(1.5, left("leaves"))
    engine.at(1.5, left("stays"), STRANGER)
    engine.loop.iterate(0.0)
    engine.loop.iterate(0.0)
    assert engine.loop._abandonment.num_abandoned == 0
    ((ended_s, name, _),) = engine.wire.ended()
    assert name == "leaves"
    assert ended_s == pytest.approx(1.0 + NUM_LAYERS * LAYER_S)
    outputs_sent = [message for _, message in engine.wire.sent if isinstance(message, wire.StepOutputs)]
    assert "stays" in {chunk.request_id for outputs in outputs_sent for chunk in outputs.chunks}
