"""The dispatcher's decisions in a simulated fleet: in any order of events every stream is its undisturbed twin."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvist.errors import KvistError
from kvist.request import Role
from tests.budget import budget
from tests.router.stream_sim import Reader, SimFleet

NAMES = {"u": Role.UNIFIED, "p1": Role.PREFILL, "p2": Role.PREFILL, "d1": Role.DECODE, "d2": Role.DECODE}
POLICIES = ("cache_aware", "cost", "round_robin")
REPORTED = ("handoff_failed", "unavailable", "step_failed", "timeout", "worker_lost", "engine_error", "invalid_request")
name = st.sampled_from(sorted(NAMES))


class FleetMachine(RuleBasedStateMachine):
    """Every fault at any time. A stream may end with an error, but once, with every token before it, and in time."""

    @initialize(policy=st.sampled_from(POLICIES), limit=st.integers(0, 4), aggregate=st.sampled_from(["auto", "never"]))
    def set_up(self, policy: str, limit: int, aggregate: str) -> None:
        self.fleet = SimFleet(policy=policy, migration_limit=limit, aggregate=aggregate, request_timeout_s=60.0)
        for each, role in NAMES.items():
            self.fleet.start(each, role)

    @rule(first=st.integers(0, 3), length=st.integers(1, 40), max_tokens=st.integers(1, 30))
    def ask(self, first: int, length: int, max_tokens: int) -> None:
        self.fleet.begin((first, *range(length)), max_tokens=max_tokens)

    @rule(name=name, num_tokens=st.integers(1, 5))
    def step(self, name: str, num_tokens: int) -> None:
        self.fleet.step(name, num_tokens)

    @rule(name=name)
    def deliver(self, name: str) -> None:
        self.fleet.deliver(name)

    @rule(name=name, num_delivered=st.integers(0, 3))
    def lose(self, name: str, num_delivered: int) -> None:
        self.fleet.lose(name, num_delivered=num_delivered)

    @rule(name=name)
    def kill(self, name: str) -> None:
        self.fleet.kill(name)

    @rule(name=name)
    def restart(self, name: str) -> None:
        if not self.fleet.lives[name].alive:
            self.fleet.lose(name)
            self.fleet.start(name)

    @rule(name=name, role=st.sampled_from(list(Role)))
    def switch(self, name: str, role: Role) -> None:
        self.fleet.switch(name, role)

    @rule(name=name, code=st.sampled_from(REPORTED), place=st.integers(0, 5))
    def fail(self, name: str, code: str, place: int) -> None:
        life = self.fleet.lives[name]
        if life.jobs:
            self.fleet.fail(life, sorted(life.jobs)[place % len(life.jobs)], code)

    @rule(name=name)
    def refuse_or_accept(self, name: str) -> None:
        self.fleet.lives[name].refuses ^= True

    @rule(name=name)
    def cut_or_join(self, name: str) -> None:
        self.fleet.unreachable ^= {name}

    @rule(seconds=st.floats(0.0, 8.0))
    def wait(self, seconds: float) -> None:
        self.fleet.advance(seconds)

    @precondition(lambda self: self.fleet.readers)
    @rule(place=st.integers(0, 100), leaves=st.booleans())
    def read(self, place: int, leaves: bool) -> None:
        readers = list(self.fleet.readers.values())
        reader = readers[place % len(readers)]
        reader.read()
        if leaves:
            reader.leave()

    @invariant()
    def every_request_at_a_worker_belongs_to_an_attempt(self) -> None:
        streams = self.fleet.streams
        for life in self.fleet.lives.values():
            for request_id in life.worker.in_flight:
                assert life.worker in streams._attempts[request_id].open
        for attempt in streams._attempts.values():
            assert attempt.open, "an ended attempt is kept"
            assert all(attempt.request_id in worker.in_flight for worker in attempt.open)
            assert attempt.over or attempt.stream.attempt is attempt, "two attempts of one stream compute"

    def teardown(self) -> None:
        if not hasattr(self, "fleet"):
            return
        self.fleet.unreachable.clear()
        for each, life in self.fleet.lives.items():
            life.refuses = False
            if not life.alive:
                self.fleet.lose(each)
                self.fleet.start(each)
        self.fleet.settle()
        self.fleet.check_settled()
        for reader in self.fleet.readers.values():
            assert reader.finished + reader.left + (reader.error is not None) == 1, "every request ends exactly once"
            assert reader.error is None or reader.error.message


TestFleetMachine = FleetMachine.TestCase
TestFleetMachine.settings = settings(
    max_examples=budget(20, long=1000), stateful_step_count=40, suppress_health_check=list(HealthCheck)
)


KILLS = st.lists(
    st.tuples(st.sampled_from(["lose", "kill", "fail"]), st.sampled_from(["d1", "d2", "p1", "p2"]), st.integers(0, 3)),
    max_size=12,
)


@pytest.mark.parametrize("survivor", ["u", "p1", "d1"])
@given(data=st.data(), policy=st.sampled_from(POLICIES), kills=KILLS)
@settings(max_examples=budget(15, long=500), suppress_health_check=list(HealthCheck))
def test_random_kills_leave_every_stream_equal_to_its_twin(
    survivor: str, data: st.DataObject, policy: str, kills: list[tuple[str, str, int]]
) -> None:
    """While one worker of any role lives, no client sees an error."""
    fleet = SimFleet(policy=policy, migration_limit=100)
    for each, role in NAMES.items():
        if role is not Role.UNIFIED or survivor == "u":
            fleet.start(each, role)
    readers = [fleet.begin((first, *range(20)), max_tokens=25) for first in range(5)]
    for how, victim, num_tokens in kills:
        for each in fleet.lives:
            fleet.step(each, num_tokens)
            for _ in range(data.draw(st.integers(0, 2))):
                fleet.deliver(each)
        for reader in fleet.readers.values():
            reader.read()
        if victim == survivor and how != "fail":
            continue
        if how == "fail":
            life = fleet.lives[victim]
            for request_id in sorted(life.jobs):
                fleet.fail(life, request_id, "handoff_failed")
        elif how == "kill":
            fleet.kill(victim)
            fleet.advance(data.draw(st.floats(0.0, 2.0)))
            fleet.lose(victim)
        else:
            fleet.lose(victim, num_delivered=num_tokens)
            if data.draw(st.booleans()):
                fleet.start(victim)
    fleet.settle()
    fleet.check_settled()
    for found in readers:
        assert isinstance(found, Reader)
        assert found.error is None, found.error
        assert found.finished


def test_a_request_that_kills_every_worker_ends_before_the_whole_fleet_is_dead() -> None:
    fleet = SimFleet(policy="round_robin")
    for number in range(8):
        fleet.start(f"w{number}")
    poisonous, other = fleet.begin((1, 2), max_tokens=40), fleet.begin((3, 4), max_tokens=400)
    assert isinstance(poisonous, Reader)
    assert isinstance(other, Reader)
    num_killed = 0

    def kill_those_that_have_it() -> bool:
        nonlocal num_killed
        for each, life in fleet.lives.items():
            if life.alive and any(
                job.request.prompt_token_ids == (1, 2) and job.position >= 5 for job in life.jobs.values()
            ):
                fleet.lose(each, num_delivered=10)
                num_killed += 1
        return poisonous.ended

    fleet.settle(until=kill_those_that_have_it)
    assert poisonous.error is not None
    assert (poisonous.error.code, poisonous.error.retryable, num_killed) == ("poisonous_request", False, 4)
    assert len(poisonous.tokens) >= 5
    fleet.settle()
    assert other.finished, "a stream beside it goes on"
    fleet.check_settled()


def test_a_stream_may_lose_any_number_of_workers_as_long_as_it_advances() -> None:
    fleet = SimFleet()
    fleet.start("a")
    fleet.start("b")
    reader = fleet.begin((1, 2), max_tokens=400)
    assert isinstance(reader, Reader)
    for _ in range(20):
        for each in ("a", "b"):
            fleet.step(each, 16)
            fleet.deliver(each)
            if fleet.lives[each].worker.in_flight:
                fleet.lose(each)
                fleet.start(each)
                fleet.advance(0.0)
                break
    fleet.settle()
    assert reader.finished
    assert reader.stream.trouble.num_failovers == 20
    assert fleet.streams.counts.failovers.by_cause == {"worker_lost": 20}
    assert fleet.streams.counts.failovers.num_resumed == 20
    fleet.check_settled()


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_no_worker_can_take_ends_within_the_migration_timeout(begun: bool) -> None:
    fleet = SimFleet()
    fleet.start("a")
    reader = fleet.begin((1, 2), max_tokens=40)
    assert isinstance(reader, Reader)
    if begun:
        fleet.step("a", 3)
        fleet.deliver("a")
    fleet.lose("a")
    fleet.advance(4.5)
    reader.read()
    assert not reader.ended, "a worker may still come"
    fleet.advance(0.5)
    reader.read()
    assert isinstance(reader.error, KvistError)
    assert (reader.error.code, reader.error.retry_after_s) == ("worker_lost", 1.0)
    assert "no other worker could go on within 5 s (--migration-timeout-s): no worker is ready" in reader.error.message
    assert len(reader.tokens) == (3 if begun else 0)
    assert fleet.streams.counts.failovers.num_failed == 1
    fleet.check_settled()


def test_a_stream_goes_on_at_a_worker_that_comes_back_in_time() -> None:
    fleet = SimFleet()
    fleet.start("a")
    reader = fleet.begin((1, 2), max_tokens=40)
    assert isinstance(reader, Reader)
    fleet.step("a", 3)
    fleet.deliver("a")
    fleet.lose("a")
    fleet.advance(3.0)
    fleet.start("a")
    fleet.settle()
    assert reader.finished
    fleet.check_settled()


def test_with_a_limit_of_0_a_failed_worker_fails_its_requests() -> None:
    fleet = SimFleet(migration_limit=0)
    fleet.start("a")
    fleet.start("b")
    reader = fleet.begin((1, 2), max_tokens=40)
    assert isinstance(reader, Reader)
    for each in ("a", "b"):
        fleet.lose(each)
    reader.read()
    assert reader.error is not None
    assert reader.error.code == "worker_lost"
    fleet.check_settled()


def test_a_token_that_died_with_prefill_is_computed_again() -> None:
    """Prefill dies after the handoff, and its first token with it: decode goes on from the second one."""
    fleet = SimFleet()
    fleet.start("p", Role.PREFILL)
    fleet.start("d", Role.DECODE)
    reader = fleet.begin((1, 2), max_tokens=9)
    assert isinstance(reader, Reader)
    fleet.step("d")
    fleet.step("p")  # hands over; its messages to the gateway are lost below
    fleet.step("d", 2)
    fleet.deliver("d")
    assert reader.stream.merger.has_gap
    fleet.lose("p")
    fleet.settle()
    assert reader.finished
    fleet.check_settled()
