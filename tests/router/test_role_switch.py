"""A worker's role is switched at any time: every stream is its undisturbed twin, and none needs a second attempt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist import wire
from kvist.request import Mode, Role
from kvist.router.config import RouterConfig
from kvist.router.registry import Registry, Worker, WorkerState
from kvist.testing.specs import make_load, make_spec
from tests.budget import budget
from tests.router.stream_sim import Reader, SimFleet

WORKERS = {"a": Role.PREFILL, "b": Role.DECODE, "c": Role.UNIFIED}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("switch"), st.sampled_from(sorted(WORKERS)), st.sampled_from(list(Role))),
        st.tuples(st.just("deliver"), st.sampled_from(sorted(WORKERS)), st.none()),
        st.tuples(st.just("step"), st.sampled_from(sorted(WORKERS)), st.none()),
        st.tuples(st.just("ask"), st.none(), st.none()),
    ),
    max_size=40,
)


@pytest.mark.parametrize("is_old", [False, True])
@given(steps=STEPS, policy=st.sampled_from(["cache_aware", "cost", "round_robin"]))
@settings(max_examples=budget(30, long=1000))
def test_switches_at_any_time_disturb_no_stream(is_old: bool, steps: list[tuple[str, str, Role]], policy: str) -> None:
    """`is_old`: the gateway knows nothing of switches, and goes on by the roles that the workers were started with."""
    fleet = SimFleet(policy=policy)
    fleet.is_old = is_old
    for name, role in WORKERS.items():
        fleet.start(name, role)
    for what, name, role in steps:
        if what == "ask":
            number = len(fleet.readers)
            assert isinstance(fleet.begin((number, *range(20)), max_tokens=7), Reader)
        elif what == "switch":
            fleet.switch(name, role)
        elif what == "deliver":
            fleet.deliver(name)
        else:
            fleet.step(name)
    fleet.settle()
    fleet.check_settled()
    assert all(reader.finished for reader in fleet.readers.values())
    assert not fleet.streams.counts.failovers.by_cause, "a stream needed a second attempt"
    for life in fleet.lives.values():
        while life.inbox or life.outbox:
            fleet.deliver(life.worker.url)
            fleet.step(life.worker.url)
        assert life.known_role is (life.worker.spec.role if is_old and life.worker.spec else life.roles.role)


def test_the_next_requests_follow_the_roles_that_the_workers_report() -> None:
    fleet = SimFleet()
    fleet.start("a", Role.PREFILL)
    fleet.start("b", Role.DECODE)
    for first, second in (("a", "b"), ("b", "a")):
        reader = fleet.begin((1, *range(40)), max_tokens=20)
        assert isinstance(reader, Reader)
        sent = {
            name: [message.mode for message in fleet.lives[name].inbox if isinstance(message, wire.Submit)]
            for name in ("a", "b")
        }
        assert sent == {first: [Mode.PREFILL], second: [Mode.DECODE]}
        fleet.switch(first, Role.DECODE)
        fleet.switch(second, Role.PREFILL)
        fleet.settle()
        assert reader.finished


def joined(wanted: Role | None, started: Role) -> tuple[Registry, Worker]:
    registry = Registry(RouterConfig())
    worker = registry.add("w", wanted, 0.0)
    registry.on_welcome(worker, wire.Welcome(spec=make_spec(role=started)), 0.0)
    return registry, worker


@pytest.mark.parametrize(
    ("wanted", "started", "reported", "used"),
    [
        (None, Role.PREFILL, None, Role.PREFILL),  # an older worker
        (None, Role.PREFILL, Role.PREFILL, Role.PREFILL),
        (None, Role.PREFILL, Role.DECODE, Role.DECODE),
        (Role.PREFILL, Role.PREFILL, Role.UNIFIED, Role.UNIFIED),  # a switch overrules --prefill URL
        (Role.PREFILL, Role.UNIFIED, Role.UNIFIED, Role.PREFILL),
        (Role.PREFILL, Role.UNIFIED, Role.DECODE, Role.DECODE),
    ],
)
def test_a_switch_overrules_the_flags_of_router_and_worker(
    wanted: Role | None, started: Role, reported: Role | None, used: Role
) -> None:
    registry, worker = joined(wanted, started)
    before = worker.role
    assert registry.on_report(worker, make_load(role=reported), 1.0) is (before is not used)
    assert worker.role is used
    assert worker.state is WorkerState.READY
    assert registry.snapshot()[0].role is used
    assert registry.role_switches == ({} if before is used else {(before, used): 1})


def test_a_lost_worker_has_the_role_of_its_spec_until_it_reports_again() -> None:
    registry, worker = joined(None, Role.PREFILL)
    registry.on_report(worker, make_load(role=Role.DECODE), 1.0)
    registry.on_lost(worker, "gone")
    assert worker.role is Role.PREFILL
