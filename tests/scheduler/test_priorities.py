"""With the scheduling policy "priority", a lower `priority` is served first and preempted last."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.request import FCFS, PRIORITY, Outcome, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.device import reference_stream
from kvist.simulation.engine import SimEngine, small_config
from kvist.testing.specs import submit_full
from kvist.wire import Ended, Grant, Submit


def unified(policy: str = PRIORITY, num_pages: int = 40, **config: Any) -> SimEngine:
    limits = {"max_running_requests": 1, "max_queued_requests": 20, **config}
    return SimCluster().start("u", config=small_config(scheduling_policy=policy, **limits), num_pages=num_pages)


def asked(name: str, priority: int = 0, num_tokens: int = 4, **fields: Any) -> Submit:
    prompt = [ord(char) % 20 for char in name] + [len(name)] * (num_tokens - len(name))
    return submit_full(sim_request(name, prompt, priority=priority, ignore_eos=True, **{"max_tokens": 3, **fields}))


def step(engine: SimEngine, *events: Submit) -> tuple[Ended, ...]:
    engine.finish_step()
    engine.events.extend(events)
    return engine.step().ended


def started(engine: SimEngine, *events: Submit) -> list[str]:
    """Run until all requests have ended; return their names in the order of their first steps."""
    order: list[str] = []
    step(engine, *events)
    for _ in range(400):
        batch = engine.plan.batch
        order += [] if batch is None else [each.request_id for each in batch.started if each.request_id not in order]
        step(engine)
        if not engine.scheduler.has_work():
            return order
    raise AssertionError("not finished")


def test_a_lower_priority_value_is_served_first_and_callers_take_turns_within_one() -> None:
    requests = [
        asked("a1", 5, client="k/h/1"),
        asked("a2", 0, client="k/h/1"),
        asked("a3", 0, client="k/h/1"),
        asked("b1", -2, client="l/h/1"),
        asked("b2", 0, client="l/h/1"),
    ]
    assert started(unified(), *requests) == ["b1", "a2", "b2", "a3", "a1"]
    assert started(unified(FCFS), *requests) == ["a1", "b1", "a2", "b2", "a3"]


def test_a_waiting_request_goes_before_running_prompts_of_a_higher_priority_value() -> None:
    def items(policy: str) -> list[str]:
        engine = unified(policy, max_running_requests=4, chunked_prefill_size=6, max_prefill_tokens=6)
        step(engine, asked("long", 1, num_tokens=30))
        step(engine, asked("soon", 0, num_tokens=6))
        return list(engine.running)

    assert items(FCFS) == ["long"]
    assert items(PRIORITY) == ["soon"]


@pytest.mark.parametrize(("policy", "victim"), [(PRIORITY, "old"), (FCFS, "new")])
def test_the_highest_priority_value_is_preempted_first_and_all_tokens_stay_the_same(policy: str, victim: str) -> None:
    engine = unified(policy, num_pages=6, max_running_requests=3, max_model_len=24)
    world = engine.world
    requests = {
        name: sim_request(name, [index] * 7, max_tokens=12, ignore_eos=True, seed=index, priority=priority)
        for index, (name, priority) in enumerate([("old", 4), ("new", 1)])
    }
    for request in requests.values():
        world.submit(request, engine)
    preempted: set[str] = set()
    for _ in range(200):
        running = {each.request_id for each in engine.scheduler.requests.running}
        for wire in list(world.wires):
            world.deliver(wire)
        step(engine)
        preempted |= running.intersection(each.request_id for each in engine.scheduler.requests.waiting)
    assert preempted == {victim}
    world.check_settled()
    for name, request in requests.items():
        assert world.stream(name) == reference_stream(request, engine.config, engine.context_len)


def test_among_equal_priorities_the_newest_is_preempted_first() -> None:
    engine = unified(num_pages=9, max_running_requests=3, max_model_len=24)
    for name in ("first", "second", "third"):
        engine.world.submit(sim_request(name, [ord(name[0])] * 7, max_tokens=12, ignore_eos=True, priority=2), engine)
    order: list[str] = []
    for _ in range(300):
        for wire in list(engine.world.wires):
            engine.world.deliver(wire)
        order += [ended.request_id for ended in step(engine)]
    assert engine.order_check.num_preempted
    assert order == ["first", "second", "third"]


def test_a_full_queue_displaces_the_highest_priority_value_and_refuses_higher_ones() -> None:
    engine = unified(max_queued_requests=2)
    assert not step(engine, asked("run", -9, max_tokens=20), asked("w1", 3), asked("w2", 5))
    (ended,) = step(engine, asked("urgent", -1))
    assert (ended.request_id, ended.outcome, ended.error_code) == ("w2", Outcome.FAILED, "overloaded")
    assert "lower `priority`" in ended.message
    (ended,) = step(engine, asked("late", 9))
    assert (ended.request_id, ended.error_code) == ("late", "overloaded")
    (ended,) = step(engine, asked("soon", 2))
    assert ended.request_id == "w1"
    assert started(engine) == ["urgent", "soon"]


def test_decode_grants_its_pages_by_priority_and_prefill_computes_by_priority() -> None:
    world = SimCluster()
    config = small_config(scheduling_policy=PRIORITY, max_running_requests=1, max_queued_requests=9)
    prefill, decode = (
        world.start("p", role=Role.PREFILL, config=config),
        world.start("d", role=Role.DECODE, config=config),
    )
    for name, priority in (("a", 3), ("b", 1), ("c", 2)):
        world.submit_pair(sim_request(name, [ord(name)] * 6, max_tokens=3, priority=priority), prefill, decode)
    for wire in list(world.wires):
        while world.wires.num_waiting(wire):
            world.deliver(wire)
    plan = decode.step()
    assert [m.message.request_id for m in plan.messages if isinstance(m.message, Grant)] == ["b"]
    prefill.step()
    assert prefill.running == ["b"]
    world.settle()
    world.check_settled()
    finished = [name for (name, epoch) in world.ended if epoch == decode.epoch]
    assert finished == ["b", "c", "a"]


@pytest.mark.parametrize("policy", [PRIORITY, FCFS])
def test_requests_in_the_background_come_last_under_every_policy(policy: str) -> None:
    requests = [asked("b1", background=True), asked("a1", 2**31 - 1), asked("b2", background=True), asked("a2")]
    order = ["a2", "a1", "b1", "b2"] if policy == PRIORITY else ["a1", "a2", "b1", "b2"]
    assert started(unified(policy), *requests) == order


def test_streams_are_in_every_step_and_the_background_gets_what_is_left() -> None:
    engine = unified(FCFS, max_running_requests=4, chunked_prefill_size=8, max_prefill_tokens=8, max_model_len=100)
    step(engine, asked("stream", num_tokens=8, max_tokens=30))
    step(engine, asked("warm", num_tokens=60, max_tokens=0, background=True))
    for number in range(3):
        step(engine, asked(f"prompt{number}", num_tokens=7, max_tokens=1))
        assert list(engine.running)[:2] == ["stream", f"prompt{number}"]
    engine.world.settle()
    assert engine.world.outcome("warm", engine) is Outcome.FINISHED
