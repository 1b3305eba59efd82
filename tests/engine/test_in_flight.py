"""The loop handles messages and reports while a device computes, and is woken by the end of a step."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from kvist import wire
from kvist.channel import EngineChannel, Member
from kvist.engine.in_flight import MAX_FAILED_STEPS_IN_A_ROW
from kvist.engine.step_waiter import StepWaiter
from kvist.errors import EngineError
from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.plan.events import StepFailed, StepFinished
from kvist.plan.plan import Plan
from kvist.plan.transfers import ToTarget, WritePages, WritesCompleted
from kvist.request import EpochId, HandoffId, RequestId, Role, SamplingParams, SlotId
from kvist.scheduler import SchedulerConfig, build_scheduler
from kvist.testing.clocks import FakeClock
from kvist.testing.loop_bench import DeviceHangs, FakeDevice, LoopBench
from kvist.testing.specs import make_peer_spec, make_pool, make_request, make_spec, submit_full, submit_prefill

GATEWAY, DECODE = b"gateway", EpochId("d")
STEP_S = 0.035
POOL = make_pool(num_pages=1024)


class Engine(LoopBench):
    """A loop whose device computes each step in 35 ms."""

    def __init__(self, *, role: Role | None = None, overlap: bool = True, step_s: float = STEP_S) -> None:
        clock = FakeClock(1.0)
        self.device = FakeDevice(clock, lambda _batch: step_s)
        config = SchedulerConfig(
            max_running_requests=16, chunked_prefill_size=64, max_prefill_tokens=64, overlap=overlap
        )
        cache = PageCache(num_pages=POOL.num_pages, page_size=4, namespace="t")
        real = build_scheduler(role, config, cache, EpochId("e"), make_peer_spec(POOL)) if role is not None else None
        super().__init__(
            spec=make_spec(max_model_len=1024, page_size=4, num_pages=POOL.num_pages),
            scheduler=real,
            runner=self.device,
            overlap=overlap,
            clock=clock,
            gateway_timeout_s=1e9,
        )
        self.order = self.device.order

    @property
    def steps_read(self) -> int:
        return sum(each.startswith("read") for each in self.order)

    def run_until(self, at_s: float) -> None:
        while self.clock.now_s() < at_s:
            self.loop.iterate(min(self.loop.idle_s(), at_s - self.clock.now_s()))


_SLOTS = itertools.count()


def batch(step_id: int) -> Batch:
    slot = SlotId(next(_SLOTS))
    start = StartRequest(
        slot=slot,
        request_id=RequestId(f"r{slot}"),
        sampling=SamplingParams(max_tokens=9),
        token_ids=(1,),
        num_prompt_tokens=1,
    )
    return Batch(
        step_id=step_id,
        started=(start,),
        items=(BatchItem(slot=slot, token_ids=(1,), start=0, page_ids=(0,), samples=True),),
    )


def prompt(num_tokens: int) -> list[int]:
    """Prompts of different lengths share no page."""
    return [(num_tokens + index) % 97 for index in range(num_tokens)]


def grant(handoff: str, num_pages: int) -> wire.Grant:
    return wire.Grant(
        handoff_id=HandoffId(handoff),
        request_id=RequestId("r"),
        target_epoch=DECODE,
        source_epoch=EpochId("e"),
        target=make_peer_spec(POOL),
        first_page=0,
        page_ids=tuple(range(num_pages)),
    )


# ---------------------------------------------------------------- messages and reports


def test_a_message_is_answered_while_a_step_runs() -> None:
    engine = Engine()
    closed = wire.Closed(handoff_id=HandoffId("h"), target_epoch=DECODE, source_epoch=EpochId("e"))
    engine.scheduler.script = [Plan(batch=batch(1)), Plan(batch=batch(2))]
    engine.run_until(1.005)
    engine.channel.deliver(
        DECODE.encode(), wire.Revoke(handoff_id=HandoffId("h"), target_epoch=DECODE, reason="x"), at_s=1.010
    )
    engine.scheduler.on_step = lambda: engine.scheduler.script.append(
        Plan(messages=(ToTarget(target_epoch=DECODE, message=closed),))
    )
    engine.run_until(1.012)
    assert next(sent.at_s for sent in engine.channel.sent if sent.message == closed) == pytest.approx(1.010)
    assert engine.order == ["launch 1", "launch 2"]


def test_done_leaves_while_the_next_prompt_is_computed() -> None:
    """The pages of the short prompt are written one millisecond after its step, and the next step takes 35 ms."""
    engine = Engine(role=Role.PREFILL)
    short, long = make_request("short", prompt(64)), make_request("long", prompt(1000))
    engine.channel.deliver(GATEWAY, submit_prefill(short, handoff_id="h", target_epoch=DECODE))
    engine.channel.deliver(DECODE.encode(), grant("h", 16))
    engine.channel.deliver(GATEWAY, submit_prefill(long, handoff_id="i", target_epoch=DECODE), at_s=1.001)
    engine.run_until(1.0 + STEP_S + 0.001)
    (write,) = engine.transport.jobs
    assert isinstance(write, WritePages)
    (outputs,) = engine.sent(wire.StepOutputs)
    assert [chunk.request_id for chunk in outputs.chunks] == ["short"]
    engine.transport.reports = [WritesCompleted(handoff_id=write.handoff_id, num_pages=16, checksum="c")]
    engine.loop.iterate(0.0)  # woken by the report
    (done,) = engine.sent(wire.Done)
    assert (done.handoff_id, done.checksum) == ("h", "c")
    assert engine.clock.now_s() < engine.device.ends[2] - 0.9 * STEP_S, "the step of the long prompt is still running"


def test_a_late_grant_sends_the_first_token_and_the_pages_while_a_step_runs() -> None:
    engine = Engine(role=Role.PREFILL)
    short, long = make_request("short", prompt(64)), make_request("long", prompt(1000))
    engine.channel.deliver(GATEWAY, submit_prefill(short, handoff_id="h", target_epoch=DECODE))
    engine.channel.deliver(GATEWAY, submit_prefill(long, handoff_id="i", target_epoch=DECODE), at_s=1.001)
    granted_s = 1.0 + STEP_S + 0.010
    engine.channel.deliver(DECODE.encode(), grant("h", 16), at_s=granted_s)
    engine.run_until(granted_s + 0.001)
    (sent,) = [each for each in engine.channel.sent if isinstance(each.message, wire.StepOutputs)]
    assert sent.at_s == pytest.approx(granted_s)
    assert [type(job) for job in engine.transport.jobs] == [WritePages]


def test_a_request_that_arrives_while_one_step_runs_follows_it_without_a_gap() -> None:
    engine = Engine(role=Role.UNIFIED)
    engine.channel.deliver(GATEWAY, submit_full(make_request("a", range(1, 30), max_tokens=1)))
    engine.channel.deliver(GATEWAY, submit_full(make_request("b", range(50, 70), max_tokens=1)), at_s=1.020)
    engine.run_until(1.021)
    assert engine.order == ["launch 1", "launch 2"]
    engine.run_until(1.2)
    assert engine.device.ends == {1: pytest.approx(1.0 + STEP_S), 2: pytest.approx(1.0 + 2 * STEP_S)}


def test_without_overlap_a_second_batch_waits_for_the_first() -> None:
    engine = Engine(role=Role.UNIFIED, overlap=False)
    engine.channel.deliver(GATEWAY, submit_full(make_request("a", range(1, 30), max_tokens=1)))
    engine.channel.deliver(GATEWAY, submit_full(make_request("b", range(50, 70), max_tokens=1)), at_s=1.020)
    engine.run_until(1.021)
    assert engine.order == ["launch 1"]
    engine.run_until(1.2)
    assert engine.order == ["launch 1", "read 1", "launch 2", "read 2"]


def test_an_abort_is_answered_while_the_step_of_its_request_runs() -> None:
    engine = Engine(role=Role.UNIFIED)
    engine.channel.deliver(GATEWAY, submit_full(make_request("a", range(1, 30))))
    engine.channel.deliver(GATEWAY, wire.Abort(request_id=RequestId("a")), at_s=1.010)
    engine.run_until(1.3)
    ends = [sent.at_s for sent in engine.channel.sent if isinstance(sent.message, wire.StepOutputs)]
    assert ends == [pytest.approx(1.010)]
    assert engine.steps_read == 2, "the second step was planned before the abort"


# ---------------------------------------------------------------- the end of a step


def test_tokens_are_sent_at_the_end_of_their_step() -> None:
    engine = Engine(role=Role.UNIFIED)
    engine.channel.deliver(GATEWAY, submit_full(make_request("a", range(1, 30), max_tokens=4)))
    engine.run_until(1.3)
    sent = [each.at_s for each in engine.channel.sent if isinstance(each.message, wire.StepOutputs)]
    assert sent == pytest.approx([1.0 + number * STEP_S for number in range(1, 5)])
    assert engine.device.ends[4] == pytest.approx(1.0 + 4 * STEP_S), "the device had no pause"


def test_the_loop_sleeps_while_a_step_runs() -> None:
    engine = Engine(role=Role.UNIFIED)
    engine.channel.deliver(GATEWAY, submit_full(make_request("a", range(1, 30), max_tokens=100)))
    engine.run_until(2.0)
    num_steps = len(engine.device.batches)
    assert num_steps == pytest.approx(1.0 / STEP_S, abs=2)
    # beside the steps: the first messages, load reports (20 a second at most), liveness
    assert len(engine.channel.timeouts) <= num_steps + 30


def test_an_engine_whose_device_hangs_falls_silent_after_a_second_or_two() -> None:
    engine = Engine(role=Role.UNIFIED)
    engine.channel.deliver(GATEWAY, submit_full(make_request("a", range(1, 30), max_tokens=100)))
    engine.run_until(1.5)
    engine.device.hangs = True
    with pytest.raises(DeviceHangs):
        engine.run_until(30.0)
    assert 2.5 < engine.clock.now_s() <= 3.6


def test_a_step_of_several_seconds_is_waited_for_and_read() -> None:
    engine = Engine(role=Role.UNIFIED, step_s=7.0)
    engine.channel.deliver(GATEWAY, submit_full(make_request("a", range(1, 30), max_tokens=2)))
    engine.run_until(20.0)
    sent = [each.at_s for each in engine.channel.sent if isinstance(each.message, wire.StepOutputs)]
    assert sent == pytest.approx([8.0, 15.0])


def test_a_device_error_fails_the_steps_in_flight_and_then_the_engine() -> None:
    engine = Engine()
    engine.scheduler.script = [Plan(batch=batch(step_id)) for step_id in range(1, 20)]
    engine.run_until(1.01)
    engine.device.fails = True
    events = engine.scheduler.seen
    with pytest.raises(EngineError, match="illegal memory access"):
        engine.run_until(9.0)
    failed = [event for step in events for event in step if isinstance(event, StepFailed)]
    assert [each.step_id for each in failed] == list(range(1, MAX_FAILED_STEPS_IN_A_ROW))


# ---------------------------------------------------------------- the thread that waits


class ThreadedStep:
    """A step that ends when the test says so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.ended = threading.Event()
        self._error = error

    def wait(self) -> None:
        assert self.ended.wait(60.0)
        if self._error is not None:
            raise self._error


def test_the_waiter_wakes_the_loop_once_for_each_step_in_order_also_for_failed_ones() -> None:
    woken = threading.Semaphore(0)
    waiter = StepWaiter(woken.release)
    first, second = ThreadedStep(RuntimeError("an illegal memory access")), ThreadedStep()
    waiter.watch(first)
    waiter.watch(second)
    second.ended.set()
    assert not woken.acquire(timeout=0.05), "steps end in the order of their launches"
    first.ended.set()
    assert woken.acquire(timeout=60.0)
    assert woken.acquire(timeout=60.0)
    waiter.close()
    assert not woken.acquire(blocking=False)


def test_a_waiter_without_steps_has_no_thread() -> None:
    before = threading.active_count()
    waiter = StepWaiter(lambda: None)
    assert threading.active_count() == before
    waiter.close()


def test_a_waiter_of_a_device_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.engine.step_waiter.CLOSE_TIMEOUT_S", 0.01)
    waiter, step = StepWaiter(lambda: None), ThreadedStep()
    waiter.watch(step)
    waiter.close()
    step.ended.set()


def test_the_end_of_a_step_ends_the_sleep_in_the_real_channel() -> None:
    channel = EngineChannel("tcp://127.0.0.1:0", member=Member("the key of this cluster"))
    waiter, step = StepWaiter(channel.wakeup), ThreadedStep()
    try:
        waiter.watch(step)
        threading.Timer(0.02, step.ended.set).start()
        began_s = time.monotonic()
        assert channel.recv(30.0) == []
        assert time.monotonic() - began_s < 25.0
        assert step.ended.is_set()
    finally:
        waiter.close()
        channel.close()


def test_a_step_that_has_ended_is_read_before_its_events_are_planned() -> None:
    engine = Engine()
    engine.scheduler.script = [Plan(batch=batch(1))]
    engine.run_until(1.0 + STEP_S)
    engine.loop.iterate(0.0)
    assert [type(event) for step in engine.scheduler.seen for event in step] == [StepFinished]
