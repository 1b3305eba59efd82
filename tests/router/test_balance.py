"""Workers move between prefill and decode by the time that requests wait."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist import wire
from kvist.request import Role, WorkerId
from kvist.router.balance import BalancedWorker, BalanceRules, BalanceState, Shift, balance, wait_of
from kvist.router.balancer import Balancer
from kvist.testing.router_bench import RouterBench, settle
from kvist.testing.specs import make_load
from tests.budget import budget
from tests.router.balance_sim import (
    DECODE_TOKENS_PER_S,
    PLACES,
    PREFILL_TOKENS_PER_S,
    Arrival,
    Simulation,
    arrivals,
)

NUM_WORKERS = 8
MIXES = ((4000, 400), (400, 4000))  # tokens of prompt and answer: 10:1, then 1:10
UTILIZATION = 0.8
RULES = BalanceRules(wait_s=2.0)


@functools.cache
def load(seed: int) -> tuple[Arrival, ...]:
    """Return requests that keep the fleet busy to 80% in both phases, at the ideal split of each."""
    seconds = [p / PREFILL_TOKENS_PER_S + o / DECODE_TOKENS_PER_S / PLACES for p, o in MIXES]  # of one worker
    rates = [UTILIZATION * NUM_WORKERS / each for each in seconds]
    return tuple(arrivals(seed, phase_s=600.0, rates=rates, mixes=MIXES))


@functools.cache
def best_fixed(seed: int, phase: int) -> int:
    """Return the goodput of the best fixed split of a phase, which has the fleet for itself."""
    requests = [each for each in load(seed) if each.phase == phase]
    splits = range(1, NUM_WORKERS)
    return max(Simulation(n, NUM_WORKERS - n, None).run(requests).get(phase, 0) for n in splits)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("num_prefill", [1, 4, 7])
def test_through_a_change_of_mix_goodput_is_within_10_percent_of_the_best_fixed_split(
    seed: int, num_prefill: int
) -> None:
    simulation = Simulation(num_prefill, NUM_WORKERS - num_prefill, RULES)
    good = simulation.run(load(seed))
    for phase in (0, 1):
        assert good[phase] >= 0.9 * best_fixed(seed, phase)
    assert len(simulation.switches) <= 20, "the workers change their roles all the time"
    fixed = Simulation(4, 4, None).run(load(seed))
    assert good[1] > 1.2 * fixed[1], "the load needs another split in each phase"


ROLE = st.sampled_from([Role.PREFILL, Role.DECODE, Role.UNIFIED])
WORKERS = st.lists(st.tuples(ROLE, st.integers(0, 20), st.integers(0, 50), st.floats(0, 30)), max_size=8)


def as_workers(fleet: list[tuple[Role, int, int, float]]) -> list[BalancedWorker]:
    return [
        BalancedWorker(
            worker_id=WorkerId(f"w{number}"),
            role=role,
            num_running=running,
            num_waiting=waiting,
            queue_wait_s=waiting * service_s / max(1, running),
        )
        for number, (role, running, waiting, service_s) in enumerate(fleet)
    ]


@given(fleets=st.lists(st.tuples(WORKERS, st.floats(0, 10)), max_size=20))
@settings(max_examples=budget(40, long=1000))
def test_each_role_keeps_a_worker_and_unified_workers_are_left_alone(
    fleets: list[tuple[list[tuple[Role, int, int, float]], float]],
) -> None:
    state, now_s, last_shift_s = BalanceState(), 0.0, float("-inf")
    for fleet, seconds in fleets:
        now_s += seconds
        workers = as_workers(fleet)
        state, shift = balance(workers, state, RULES, now_s)
        if shift is None:
            continue
        by_id = {worker.worker_id: worker for worker in workers}
        given_up = by_id[shift.worker_id].role
        assert {given_up, shift.role} == {Role.PREFILL, Role.DECODE}
        assert sum(worker.role is given_up for worker in workers) >= 2
        assert (
            shift.wait_s == wait_of(shift.role, workers) > max(RULES.wait_s, RULES.ratio * wait_of(given_up, workers))
        )
        assert now_s >= last_shift_s + RULES.pause_s
        last_shift_s = now_s


CROWDED = as_workers([(Role.PREFILL, 1, 9, 1.0), (Role.DECODE, 3, 0, 9.0), (Role.DECODE, 2, 0, 9.0)])


def test_the_least_busy_worker_is_switched_after_requests_have_waited_for_a_while() -> None:
    state, shift = balance(CROWDED, BalanceState(), RULES, 10.0)
    assert shift is None, "a short queue comes and goes"
    state, shift = balance(CROWDED, state, RULES, 11.0)
    assert shift == Shift(worker_id=WorkerId("w2"), role=Role.PREFILL, wait_s=9.0)


def test_a_burst_that_free_places_take_at_once_and_an_unmeasured_wait_switch_no_worker() -> None:
    """By the time of a request, five waiting beside one that runs would wait for 100 s."""
    for wait_s in (0.05, None):
        fleet = as_workers([(Role.PREFILL, 1, 0, 1.0), (Role.PREFILL, 1, 0, 1.0), (Role.DECODE, 1, 5, 20.0)])
        fleet[-1] = replace(fleet[-1], queue_wait_s=wait_s)
        state = BalanceState()
        for now_s in range(30):
            state, shift = balance(fleet, state, RULES, float(now_s))
            assert shift is None


def test_a_switch_by_others_is_waited_for_too() -> None:
    state, _ = balance(CROWDED, BalanceState(), RULES, 10.0)
    others = [(Role.PREFILL, 1, 9, 1.0), *[(Role.DECODE, 2, 0, 9.0)] * 2]
    before, after = (as_workers([*others, (role, 0, 0, 0.0)]) for role in (Role.PREFILL, Role.DECODE))
    state, _ = balance(before, state, RULES, 10.5)
    state, shift = balance(after, state, RULES, 11.0)
    assert shift is None
    assert balance(after, state, RULES, 15.9)[1] is None
    assert balance(after, state, RULES, 16.0)[1] is not None


def test_while_the_wait_becomes_shorter_no_further_worker_is_switched() -> None:
    state, _ = balance(CROWDED, BalanceState(), RULES, 0.0)
    state, shift = balance(CROWDED, state, RULES, 1.0)
    assert shift is not None
    fleet = [(Role.PREFILL, 1, 8, 1.0), (Role.PREFILL, 1, 0, 1.0), (Role.DECODE, 3, 0, 9.0), (Role.DECODE, 3, 0, 9.0)]
    state, shift = balance(as_workers(fleet), state, RULES, 6.0)
    state, shift = balance(as_workers(fleet), state, RULES, 11.5)
    assert shift is None, "4 s after 9 s"
    state, shift = balance(as_workers([(Role.PREFILL, 1, 30, 1.0), *fleet[1:]]), state, RULES, 17.0)
    assert shift is not None


# ---------------------------------------------------------------- the shell


async def test_the_balancer_switches_a_worker_and_leaves_alone_one_that_refuses() -> None:
    bench = RouterBench()
    prefill = bench.engines.join("p", role=Role.PREFILL)
    others = [bench.engines.join(name, role=Role.DECODE) for name in ("d1", "d2", "d3")]
    bench.engines.join("old", role=Role.DECODE, protocol_version=4)
    bench.registry.on_report(prefill, make_load(num_running=1, num_waiting=9, queue_wait_s=9.0), 0.0)
    for worker in others:
        bench.registry.on_report(worker, make_load(), 0.0)
    balancer = Balancer(bench.registry, bench.dispatcher, RULES, bench.clock)

    async def check(**answer: str) -> list[tuple[str, Role]]:
        bench.engines.sent.clear()
        checking = asyncio.ensure_future(balancer.check())
        await settle()
        sent = [(worker, call) for worker, call in bench.engines.sent if isinstance(call, wire.SetRole)]
        for worker, call in sent:
            bench.dispatcher.on_answer(worker, wire.RoleAnswer(call_id=call.call_id, **answer))
        await checking
        return [(worker.url, call.role) for worker, call in sent]

    assert await check() == []
    bench.clock.advance(1.0)
    assert await check(error_code="conflict", message="no transport reaches its pages") == [("d1", Role.PREFILL)]
    bench.clock.advance(6.0)
    assert await check() == [("d2", Role.PREFILL)]
    bench.registry.on_report(others[1], make_load(role=Role.PREFILL), 7.0)
    bench.clock.advance(20.0)
    await check()
    bench.clock.advance(20.0)
    assert await check() == [], "one decode worker that can be switched is left"
