"""The engine loop against fakes: events in, messages out, also with faulty peers, gateways and runners."""

from __future__ import annotations

import itertools
import logging

import pytest

from kvist import wire
from kvist.engine import gateways
from kvist.engine.counters import CPU_COUNTERS, ENGINE_COUNTERS, LOOP_COUNTERS
from kvist.engine.in_flight import MAX_FAILED_STEPS_IN_A_ROW
from kvist.engine.loop import STORE_PROBE_S
from kvist.errors import EngineError
from kvist.lease_messages import LeaseAnswer, LeaseCommand
from kvist.plan.batch import Batch, BatchItem, StartRequest
from kvist.plan.events import SampledTokens, StepFailed, StepFinished
from kvist.plan.plan import Flush, Plan
from kvist.plan.tiers import FetchPages, FindPages, PagesFound
from kvist.plan.transfers import (
    PagesVerified,
    PeerDied,
    StopWrites,
    ToSource,
    ToTarget,
    VerifyPages,
    WritePages,
    WritesCompleted,
)
from kvist.request import (
    EpochId,
    HandoffId,
    Outcome,
    RequestId,
    SamplingParams,
    SlotId,
)
from kvist.testing.loop_bench import FakeStorage, LoopBench
from kvist.testing.page_events import changed_pages, short, tier_changes
from kvist.testing.specs import make_peer_spec, make_pool, make_request, make_spec, submit_full
from kvist.wire import Abort, Ack, Closed, FlushCache, Revoke

G1, G2 = b"gateway-1", b"gateway-2"
POOL = make_pool()
SPEC = make_spec()


@pytest.fixture
def engine() -> LoopBench:
    return LoopBench()


def submit(request_id: str, *token_ids: int) -> wire.Submit:
    return submit_full(make_request(request_id, token_ids or (1, 2, 3)))


def chunk(request_id: str, position: int = 0) -> wire.TokenChunk:
    return wire.TokenChunk(request_id=RequestId(request_id), position=position, token_ids=(7,))


def ended(request_id: str) -> wire.Ended:
    return wire.Ended(request_id=RequestId(request_id), outcome=Outcome.FINISHED)


def batch(request_id: str, step_id: int = 1, allowed_token_ids: tuple[int, ...] = ()) -> Batch:
    """A batch of one request, in a slot of its own."""
    slot = SlotId(next(_SLOTS))
    start = StartRequest(
        slot=slot,
        request_id=RequestId(request_id),
        sampling=SamplingParams(max_tokens=1, allowed_token_ids=allowed_token_ids),
        token_ids=(1,),
        num_prompt_tokens=1,
    )
    item = BatchItem(slot=slot, token_ids=(1,), start=0, page_ids=(0,), samples=True)
    return Batch(step_id=step_id, started=(start,), items=(item,))


_SLOTS = itertools.count()
HELLO = wire.Hello(gateway_id="g")


# ---------------------------------------------------------------- messages become events


def test_every_message_reaches_the_scheduler_as_its_event(engine: LoopBench) -> None:
    target, source, handoff = EpochId("d"), EpochId("e"), HandoffId("h")
    grant = wire.Grant(
        handoff_id=handoff,
        request_id=RequestId("r"),
        target_epoch=target,
        source_epoch=source,
        target=make_peer_spec(POOL),
        first_page=0,
        page_ids=(1,),
    )
    request = submit("r")
    events = engine.iterate(
        (G1, request),
        (G1, wire.Abort(request_id=RequestId("r"))),
        (G1, wire.FlushCache(call_id="c")),
        (b"d", grant),
        (b"d", wire.Ack(handoff_id=handoff, target_epoch=target)),
        (b"d", wire.Revoke(handoff_id=handoff, target_epoch=target, reason="late")),
    )
    assert events == [
        submit_full(request.request),
        Abort(request_id=RequestId("r")),
        FlushCache(call_id="c"),
        grant,
        Ack(handoff_id=handoff, target_epoch=target),
        Revoke(handoff_id=handoff, target_epoch=target, reason="late"),
    ]


def test_requests_sent_together_are_events_of_one_step_and_each_is_checked_alone(engine: LoopBench) -> None:
    together = wire.SubmitTogether(submits=(submit("a"), submit("b", 1, 100), submit("c")))
    assert engine.iterate((G1, together)) == [submit("a"), submit("c")]
    [outputs] = engine.sent(wire.StepOutputs, G1)
    assert [(end.request_id, end.error_code) for end in outputs.ended] == [("b", "invalid_request")]


def test_an_answer_about_leases_goes_to_the_gateway_that_asked(engine: LoopBench) -> None:
    asked = LeaseCommand(call_id="c", action="list", owner="k")
    assert engine.iterate((G1, asked), (G2, LeaseCommand(call_id="d", action="renew", owner="k", ttl_s=601.0))) == [
        asked
    ]
    answer = LeaseAnswer(call_id="c")
    engine.iterate(plan=Plan(lease_answers=(answer,)))
    assert (engine.sent(LeaseAnswer, G1), engine.sent(LeaseAnswer, G2)) == ([answer], [])


def test_the_engine_answers_hello_with_its_spec(engine: LoopBench) -> None:
    engine.iterate((G1, HELLO))
    assert engine.sent(wire.Welcome, G1) == [wire.Welcome(spec=SPEC)]


def test_a_gateway_cannot_abort_the_requests_of_another(engine: LoopBench) -> None:
    engine.iterate((G1, submit("r")))
    assert engine.iterate((G2, wire.Abort(request_id=RequestId("r")))) == []


@pytest.mark.parametrize("token_ids", [(1, 100), (-1, 5)])
def test_a_token_outside_the_vocabulary_is_refused_before_it_can_fail_a_batch(
    engine: LoopBench, token_ids: tuple[int, ...]
) -> None:
    assert engine.iterate((G1, submit("r", *token_ids))) == []
    [outputs] = engine.sent(wire.StepOutputs, G1)
    assert [(end.outcome, end.error_code) for end in outputs.ended] == [(Outcome.FAILED, "invalid_request")]


def test_a_request_id_in_use_is_refused_and_the_first_request_keeps_its_gateway(engine: LoopBench) -> None:
    engine.iterate((G1, submit("r")))
    assert engine.iterate((G2, submit("r"))) == []
    assert len(engine.sent(wire.StepOutputs, G2)) == 1
    engine.iterate(plan=Plan(chunks=(chunk("r"),)))
    assert engine.sent(wire.StepOutputs, G1) == [wire.StepOutputs(chunks=(chunk("r"),))]


def test_a_gateway_over_the_limit_is_refused_until_another_one_leaves(
    engine: LoopBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateways, "MAX_GATEWAYS", 1)
    engine.iterate((G1, submit("a")))
    assert engine.iterate((G2, submit("b"))) == []
    [outputs] = engine.sent(wire.StepOutputs, G2)
    assert outputs.ended[0].error_code == "overloaded"
    engine.clock.advance(11)
    engine.iterate()
    assert len(engine.iterate((G2, submit("b")))) == 1


def test_a_request_id_may_be_used_again_after_its_end(engine: LoopBench) -> None:
    engine.iterate((G1, submit("r")))
    engine.iterate(plan=Plan(ended=(ended("r"),)))
    assert len(engine.iterate((G1, submit("r")))) == 1


# ---------------------------------------------------------------- a plan is carried out


def test_a_step_sends_each_gateway_one_message_for_all_its_streams(engine: LoopBench) -> None:
    engine.iterate((G1, submit("a")), (G1, submit("b")), (G2, submit("c")))
    engine.iterate(plan=Plan(chunks=(chunk("a"), chunk("b"), chunk("c")), ended=(ended("b"),)))
    assert engine.sent(wire.StepOutputs, G1) == [wire.StepOutputs(chunks=(chunk("a"), chunk("b")), ended=(ended("b"),))]
    assert engine.sent(wire.StepOutputs, G2) == [wire.StepOutputs(chunks=(chunk("c"),))]


def test_chunks_of_unknown_requests_are_dropped(engine: LoopBench) -> None:
    engine.iterate((G1, HELLO), plan=Plan(chunks=(chunk("ghost"),), ended=(ended("ghost"),)))
    assert not engine.sent(wire.StepOutputs)


def test_tokens_leave_before_the_next_batch_is_computed(engine: LoopBench) -> None:
    engine.iterate((G1, submit("a")), plan=Plan(chunks=(chunk("a"),), batch=batch("a")))
    assert engine.order == ["send StepOutputs", "send LoadReport", "launch 1", "read 1"]


def test_a_finished_batch_is_an_event_of_the_next_step_without_a_wait(engine: LoopBench) -> None:
    engine.iterate(plan=Plan(batch=batch("a")))
    assert engine.loop.idle_s() == 0.0
    assert engine.iterate() == [StepFinished(step_id=1, sampled=SampledTokens(token_ids=[9]))]


def test_with_overlap_the_next_batch_is_launched_before_this_one_is_read() -> None:
    engine = LoopBench(overlap=True)
    engine.iterate(plan=Plan(batch=batch("a", 1)))
    assert engine.loop.idle_s() == 0.0, "the next can be planned at once"
    assert engine.iterate(plan=Plan(batch=batch("a", 2))) == []
    (finished,) = engine.iterate()
    assert isinstance(finished, StepFinished)
    assert finished.step_id == 1
    assert engine.steps == ["launch 1", "launch 2", "read 1", "read 2"]


def test_with_overlap_a_batch_without_a_successor_is_read_at_once() -> None:
    engine = LoopBench(overlap=True)
    engine.iterate(plan=Plan(batch=batch("a")))
    engine.iterate()
    assert engine.steps == ["launch 1", "read 1"]
    assert [type(event) for event in engine.iterate()] == [StepFinished]


def find(job_id: int) -> FindPages:
    return FindPages(job_id=job_id, digests=(b"d",))


def test_a_new_request_is_looked_up_in_the_store_before_its_batch_is_planned() -> None:
    storage = FakeStorage(finds=True)
    engine = LoopBench(storage=storage)
    fetch = FetchPages(job_id=3, digests=(b"d",), host_slots=(0,))
    engine.scheduler.script = [Plan(tier_jobs=(find(1), find(2))), Plan(tier_jobs=(fetch,), batch=batch("a"))]
    engine.iterate((G1, submit("r")), (G1, submit("s")))
    assert [len(events) for events in engine.scheduler.seen] == [2, 2]
    assert engine.scheduler.seen[1] == [PagesFound(job_id=1, num_pages=1), PagesFound(job_id=2, num_pages=1)]
    assert engine.scheduler.with_batch == [False, True]
    assert (storage.jobs, engine.steps) == ([find(1), find(2), fetch], ["launch 1", "read 1"])
    engine.iterate((G1, wire.Abort(request_id=RequestId("r"))))
    assert engine.scheduler.with_batch == [False, True, True], "nobody arrived"


def test_a_store_that_does_not_answer_delays_one_batch_by_two_milliseconds() -> None:
    engine = LoopBench(storage=FakeStorage(finds=False))
    engine.channel.sleeps = True
    engine.scheduler.script = [Plan(tier_jobs=(find(1), find(2), find(3))), Plan(batch=batch("a"))]
    engine.iterate((G1, submit("r")))
    assert engine.channel.timeouts == pytest.approx([0.0, STORE_PROBE_S])
    assert engine.steps == ["launch 1", "read 1"]
    engine.iterate()
    assert engine.channel.timeouts == pytest.approx([0.0, STORE_PROBE_S, 0.0])


def test_messages_that_arrive_during_the_store_lookup_are_not_lost() -> None:
    engine = LoopBench(storage=FakeStorage(finds=True))
    engine.scheduler.script = [Plan(tier_jobs=(find(1),))]
    abort = wire.Abort(request_id=RequestId("r"))
    engine.scheduler.on_step = lambda: None if engine.scheduler.seen else engine.channel.deliver(G1, abort)
    assert engine.iterate((G1, submit("r"))) == [
        PagesFound(job_id=1, num_pages=1),
        abort,
    ]


def test_a_failed_launch_is_reported_after_the_batch_before_it() -> None:
    engine = LoopBench(overlap=True)
    engine.iterate(plan=Plan(batch=batch("a", 1)))
    engine.runner.fails = True
    engine.iterate(plan=Plan(batch=batch("a", 2)))
    (first,) = engine.iterate()
    (second,) = engine.iterate()
    assert isinstance(first, StepFinished)
    assert second == StepFailed(step_id=2, message="RuntimeError: the device is on fire")


def test_a_batch_that_fails_when_read_is_a_failed_step(engine: LoopBench) -> None:
    engine.runner.fails_late = True
    engine.iterate(plan=Plan(batch=batch("a")))
    assert engine.iterate() == [StepFailed(step_id=1, message="RuntimeError: the device is on fire")]


def test_a_runner_that_raises_fails_the_step_and_the_engine_goes_on(engine: LoopBench) -> None:
    engine.runner.fails = True
    engine.iterate(plan=Plan(batch=batch("a")))
    [failed] = engine.iterate()
    assert isinstance(failed, StepFailed)
    assert "on fire" in failed.message
    engine.runner.fails = False
    engine.iterate(plan=Plan(batch=batch("b", step_id=2)))
    assert isinstance(engine.iterate()[0], StepFinished)


def test_an_engine_ends_after_repeated_failed_steps_and_fails_its_requests(engine: LoopBench) -> None:
    engine.iterate((G1, submit("a")))
    engine.runner.fails = True
    engine.scheduler.script += [Plan(batch=batch("a", step_id)) for step_id in range(20)]
    with pytest.raises(EngineError, match="on fire"):
        engine.loop.run()
    assert len(engine.runner.batches) == MAX_FAILED_STEPS_IN_A_ROW
    assert len(engine.sent(wire.StepOutputs, G1)) == 1


@pytest.mark.parametrize("late", [False, True], ids=["at the launch", "when it is read"])
def test_an_engine_error_of_the_runner_ends_the_engine_at_once(engine: LoopBench, late: bool) -> None:
    engine.iterate((G1, submit("a")))
    engine.runner.fails, engine.runner.fails_late = not late, late
    engine.runner.error = EngineError("tensor-parallel rank 1 ended")
    engine.scheduler.script += [Plan(batch=batch("a", step_id)) for step_id in range(20)]
    with pytest.raises(EngineError, match="rank 1 ended"):
        engine.loop.run()
    assert len(engine.runner.batches) == 1
    assert len(engine.sent(wire.StepOutputs, G1)) == 1


def test_every_iteration_of_the_loop_is_counted(engine: LoopBench) -> None:
    engine.iterate()
    engine.iterate((G1, submit("a")))
    assert engine.loop.num_iterations == 2


def test_transfers_and_peer_messages_go_where_the_plan_says(engine: LoopBench) -> None:
    handoff = HandoffId("h")
    jobs = (
        WritePages(handoff_id=handoff, pool=POOL, page_ids=(1,), peer_page_ids=(2,)),
        VerifyPages(handoff_id=handoff, page_ids=(1,), transport="shm"),
        StopWrites(handoff_id=handoff),
    )
    ack = wire.Ack(handoff_id=handoff, target_epoch=EpochId("d"))
    closed = wire.Closed(handoff_id=handoff, target_epoch=EpochId("d"), source_epoch=EpochId("e"))
    messages = (
        ToSource(endpoint="tcp://p", message=ack),
        ToTarget(target_epoch=EpochId("d"), message=closed),
    )
    engine.iterate(plan=Plan(transfers=jobs, messages=messages))
    assert engine.transport.jobs == list(jobs)
    assert engine.channel.to_peers == [("tcp://p", ack)]
    assert engine.sent(wire.Closed, b"d") == [closed]


def test_transfer_reports_come_before_the_messages_of_the_same_iteration(engine: LoopBench) -> None:
    """The scheduler treats the first completion after a stop as its answer, so an older one must not come later."""
    engine.transport.reports = [WritesCompleted(handoff_id=HandoffId("h"), num_pages=1, checksum="c")]
    events = engine.iterate((b"d", wire.Revoke(handoff_id=HandoffId("h"), target_epoch=EpochId("d"), reason="x")))
    assert [type(event) for event in events] == [WritesCompleted, Revoke]


def test_a_grant_that_cannot_be_sent_counts_as_refused(engine: LoopBench) -> None:
    grant = wire.Grant(
        handoff_id=HandoffId("h"),
        request_id=RequestId("r"),
        target_epoch=EpochId("e"),
        source_epoch=EpochId("p"),
        target=make_peer_spec(POOL),
        first_page=0,
        page_ids=(1,),
    )
    engine.channel.unreachable.add("tcp://p")
    engine.iterate(plan=Plan(messages=(ToSource(endpoint="tcp://p", message=grant, repeated=True),)))
    assert engine.iterate() == []  # the previous Grant may have arrived: prefill may be writing
    engine.iterate(plan=Plan(messages=(ToSource(endpoint="tcp://p", message=grant),)))
    [event] = engine.iterate()
    assert isinstance(event, Closed)
    assert event.error_code == "handoff_failed"
    assert (event.handoff_id, event.source_epoch) == ("h", "p")


def test_a_flush_is_answered_to_the_gateway_that_sent_it(engine: LoopBench) -> None:
    flushed = Plan(flushes=(Flush(call_id="c", num_pages=3),))
    [event] = engine.iterate((G2, wire.FlushCache(call_id="c", tier="device")), plan=flushed)
    assert event == FlushCache(call_id="c", tier="device")
    assert engine.sent(wire.Flushed) == engine.sent(wire.Flushed, G2) == [wire.Flushed(call_id="c", num_pages=3)]


# ---------------------------------------------------------------- gateways and peers that go


def test_the_requests_of_a_silent_gateway_are_aborted_once(engine: LoopBench) -> None:
    engine.iterate((G1, submit("a")), (G2, submit("b")))
    engine.clock.advance(6)
    engine.iterate((G2, HELLO))
    engine.clock.advance(6)
    assert engine.iterate() == [Abort(request_id=RequestId("a"))]
    engine.clock.advance(2)
    assert engine.iterate((G2, HELLO)) == []


def test_a_gateway_that_returns_gets_the_endings_of_its_aborted_requests(engine: LoopBench) -> None:
    engine.iterate((G1, submit("a")))
    engine.clock.advance(11)
    engine.iterate()
    engine.iterate((G1, HELLO), plan=Plan(ended=(ended("a"),)))
    assert engine.sent(wire.StepOutputs, G1) == [wire.StepOutputs(ended=(ended("a"),))]


def test_the_requests_of_a_gateway_that_does_not_read_are_aborted(engine: LoopBench) -> None:
    engine.iterate((G1, submit("a")), (G1, submit("b")))
    engine.channel.unreachable.add(G1)
    engine.iterate(plan=Plan(chunks=(chunk("a"),)))
    assert engine.iterate() == [Abort(request_id=RequestId("a")), Abort(request_id=RequestId("b"))]
    assert engine.iterate() == []


def test_watched_peers_are_checked_at_once_and_then_each_second(engine: LoopBench) -> None:
    watching = Plan(watched_epochs=frozenset({EpochId("p")}))
    engine.iterate(plan=watching)
    assert engine.transport.asked == ["p"]
    engine.iterate(plan=watching)
    assert engine.transport.asked == ["p"]
    engine.transport.dead.add(EpochId("p"))
    engine.clock.advance(1.0)
    assert engine.iterate(plan=watching) == [PeerDied(epoch=EpochId("p"))]


def test_a_peer_that_is_dead_already_is_reported_in_the_next_step(engine: LoopBench) -> None:
    engine.transport.dead.add(EpochId("p"))
    engine.iterate(plan=Plan(watched_epochs=frozenset({EpochId("p")})))
    assert engine.iterate() == [PeerDied(epoch=EpochId("p"))]


def test_the_loop_sleeps_until_the_wake_time_of_the_plan(engine: LoopBench) -> None:
    engine.iterate(plan=Plan(wake_at_s=100.25))
    assert engine.loop.idle_s() == pytest.approx(0.25)
    engine.iterate(plan=Plan(wake_at_s=None))
    assert 0.25 < engine.loop.idle_s() <= 1.0


def test_a_transfer_report_is_an_event(engine: LoopBench) -> None:
    verified = PagesVerified(handoff_id=HandoffId("h"), checksum="c")
    engine.transport.reports = [verified]
    assert engine.iterate() == [verified]


def test_stopping_the_loop_fails_open_requests_with_the_reason(engine: LoopBench) -> None:
    engine.iterate((G1, submit("a")), (G2, submit("b")))
    engine.loop.request_stop()
    engine.loop.run()
    for gateway in (G1, G2):
        [outputs] = engine.sent(wire.StepOutputs, gateway)
        assert [(end.outcome, end.error_code) for end in outputs.ended] == [(Outcome.FAILED, "unavailable")]
    assert engine.channel.num_wakeups == 1


# ---------------------------------------------------------------- load reports


D1, D2 = short(b"d1"), short(b"d2")


def reports(engine: LoopBench, to: bytes) -> list[wire.LoadReport]:
    return engine.sent(wire.LoadReport, to)


def test_load_reports_are_sent_each_second_and_after_changes_of_pages_at_most_every_50_ms(engine: LoopBench) -> None:
    engine.iterate((G1, HELLO))
    first = reports(engine, G1)[0]
    assert (first.num_running, first.num_waiting, first.num_free_pages, first.totals["steps"]) == (3, 5, 1, 7.0)
    engine.iterate(plan=Plan(changed_pages=(changed_pages(D1),)))
    engine.iterate(plan=Plan(changed_pages=(changed_pages(D2),)))
    assert len(reports(engine, G1)) == 1
    assert engine.loop.idle_s() == pytest.approx(0.05)
    engine.clock.advance(0.05)
    engine.iterate()
    assert len(reports(engine, G1)) == 2
    engine.clock.advance(0.9)
    engine.iterate()
    assert len(reports(engine, G1)) == 2
    engine.clock.advance(0.1)
    engine.iterate()
    assert len(reports(engine, G1)) == 3


def test_page_events_go_to_the_gateways_that_have_asked_for_pages(engine: LoopBench) -> None:
    engine.iterate((G1, HELLO), (G2, HELLO))
    engine.iterate((G1, wire.ListPages()), plan=Plan(changed_pages=(changed_pages(D1),)))
    first, listed, _ = engine.sent(wire.PageEvents, G1)
    assert first.changes == (tier_changes(D1),)
    assert listed.listed == tuple(engine.cached_pages)
    assert {each.tier: each.num_pages for each in listed.sums} == {"device": 1, "host": 0}
    assert [each.sequence for each in (first, listed)] == [0, 1]
    assert engine.sent(wire.PageEvents, G2) == []


def test_undecodable_messages_and_failed_steps_are_counted_in_the_report(engine: LoopBench) -> None:
    engine.channel.num_undecodable = 4
    engine.iterate((G1, HELLO))
    assert reports(engine, G1)[0].totals["undecodable_messages"] == 4.0
    assert reports(engine, G1)[0].totals["failed_steps"] == 0.0


def test_the_loop_reports_exactly_the_counters_that_it_declares(engine: LoopBench) -> None:
    engine.iterate((G1, HELLO))
    of_scheduler = {"steps"}  # of the fake scheduler; the fake mover and storage count nothing
    assert set(reports(engine, G1)[0].totals) - of_scheduler == {*LOOP_COUNTERS.names(), *CPU_COUNTERS.names()}


def test_every_counter_is_declared_once_in_one_room() -> None:
    names = [name for group in ENGINE_COUNTERS for name in group.names()]
    assert len(names) == len(set(names)) > 60


@pytest.mark.case("nan-logits")
def test_a_step_with_nan_logits_is_counted_and_logged(engine: LoopBench, caplog: pytest.LogCaptureFixture) -> None:
    engine.iterate((G1, HELLO))
    engine.runner.invalid_rows = frozenset({0})
    for step_id in range(1, 12):  # more often than an engine with a broken device would go on
        engine.iterate(plan=Plan(batch=batch("a", step_id)))
        (finished,) = engine.iterate()
        assert isinstance(finished, StepFinished)
        assert finished.sampled.invalid_rows == {0}
    assert "step 1: 1 of its 1 requests have no valid token" in caplog.text
    engine.clock.advance(2.0)
    engine.iterate()
    assert reports(engine, G1)[-1].totals["failed_steps"] == 11.0


def test_fields_that_leave_no_token_fail_their_request_and_not_its_step(
    engine: LoopBench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine.iterate((G1, HELLO))
    engine.runner.invalid_rows = frozenset({0})
    engine.iterate(plan=Plan(batch=batch("a", allowed_token_ids=(1,))))
    engine.iterate()
    assert {record.levelname for record in caplog.records if "leave no token" in record.message} == {"INFO"}
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    engine.clock.advance(2.0)
    engine.iterate()
    assert reports(engine, G1)[-1].totals["failed_steps"] == 0.0
