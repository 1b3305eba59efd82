"""Overload at three times the capacity, and floods of one client, in simulated time: exact numbers, no noise."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from kvist.errors import Overloaded
from kvist.plan.batch import Batch
from kvist.request import PRIORITY
from kvist.scheduler import SchedulerConfig
from kvist.simulation.timed_fleet import Served, TimedFleet
from kvist.testing.specs import make_request

NUM_PLACES, NUM_OUTPUT, NUM_PROMPT = 16, 20, 16
STEP_S, TOKEN_S = 0.020, 10e-6
# A request takes 20 steps on average, of which one computes its prompt; each step serves all places.
REQUEST_S = NUM_OUTPUT * STEP_S
FOR_S = 8.0
CAPACITY = NUM_PLACES / REQUEST_S  # requests per second and worker, without the tokens' own time


def step_s(batch: Batch) -> float:
    return STEP_S + TOKEN_S * batch.num_tokens


def fleet(num_workers: int = 1, **limits: object) -> TimedFleet:
    config = {
        "max_running_requests": NUM_PLACES,
        "max_queued_requests": 64,
        "chunked_prefill_size": 512,
        "max_prefill_tokens": 512,
        **limits,
    }
    return TimedFleet(num_workers=num_workers, config=SchedulerConfig(**config), step_s=step_s)  # type: ignore[arg-type]


def load(fleet: TimedFleet, name: str, *, rate: float, for_s: float, seed: int = 1, **fields: Any) -> list[str]:
    """Submit requests at random times, `rate` per second; return their names."""
    names: list[str] = []
    rng, at_s = random.Random(seed), 0.0
    given = {"ignore_eos": True, **fields}
    while (at_s := at_s + rng.expovariate(rate)) < for_s:
        names.append(f"{name}{len(names)}")
        prompt = [rng.randrange(1000) for _ in range(NUM_PROMPT)]  # no common prefix
        num_output = rng.randrange(NUM_OUTPUT // 2, NUM_OUTPUT * 3 // 2 + 1)
        fleet.submit(make_request(names[-1], prompt, max_tokens=num_output, **given), at_s=at_s)
    return names


def quantile(values: Iterable[float], part: float) -> float:
    return float(np.quantile(list(values), part))


def latencies(served: Iterable[Served]) -> list[float]:
    return [each.latency_s for each in served if not each.refused]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_at_three_times_the_capacity_admitted_requests_keep_their_latency_and_the_rest_get_a_429(
    num_workers: int,
) -> None:
    limits = {"max_queue_wait_s": 0.15 * REQUEST_S}
    unloaded, loaded = fleet(num_workers, **limits), fleet(num_workers, **limits)
    load(unloaded, "r", rate=0.5 * CAPACITY * num_workers, for_s=FOR_S)
    names = load(loaded, "r", rate=3.0 * CAPACITY * num_workers, for_s=FOR_S)
    for each in (unloaded, loaded):
        each.run()
    base, found = latencies(unloaded.served.values()), latencies(loaded.served.values())
    assert quantile(found, 0.5) < 1.3 * quantile(base, 0.5)
    assert quantile(found, 0.99) < 1.3 * quantile(base, 0.99)
    assert len(found) > 0.9 * CAPACITY * num_workers * FOR_S, "the workers stay busy"
    refused = [loaded.served[name].error for name in names if loaded.served[name].refused]
    assert len(refused) + len(found) == len(names)
    assert all(isinstance(error, Overloaded) and (error.retry_after_s or 0.0) >= 1.0 for error in refused)


def test_retry_after_is_the_queued_work_over_the_measured_rate() -> None:
    loaded = fleet(max_queued_requests=160)
    load(loaded, "r", rate=6.0 * CAPACITY, for_s=20.0)
    loaded.run()
    late = [s for s in loaded.served.values() if s.refused and s.asked_s > 10.0]
    expected_s = 160 / CAPACITY  # the queue is full when a request is refused
    assert late
    for each in late:
        assert each.error is not None
        assert each.error.retry_after_s == pytest.approx(expected_s, rel=0.25)


def test_nothing_at_the_gateway_or_at_a_worker_grows_with_the_requests_that_are_refused() -> None:
    loaded = fleet(max_queued_requests=8)
    names = load(loaded, "r", rate=10.0 * CAPACITY, for_s=4.0)
    loaded.run()
    (worker,) = loaded.workers
    assert len(names) > 1000
    assert worker.most_live <= NUM_PLACES + 8
    assert not worker.scheduler.requests.live
    assert not worker.link.in_flight
    assert len(worker.link.callers) == 0
    assert loaded.streams.num_open == 0


@pytest.mark.case("fairness")
@pytest.mark.parametrize(("num_workers", "num_places"), [(1, 8), (2, 8), (1, 16), (1, 48)])
def test_the_flood_of_one_key_does_not_double_the_time_to_first_token_of_another(
    num_workers: int, num_places: int
) -> None:
    """Without the flood the workers are nearly full. With few places, a place becomes free only every second step."""

    def ttft(flood: float) -> list[float]:
        world = fleet(num_workers, max_running_requests=num_places, max_queued_requests=48)
        capacity, for_s = num_places / REQUEST_S * num_workers, min(8.0, 80.0 / num_places + 2.0)
        mine = load(world, "mine", rate=0.3 * capacity, for_s=for_s, client="k1/h/1")
        load(world, "base", rate=0.6 * capacity, for_s=for_s, seed=2, client="k2/h/1")
        if flood:
            load(world, "flood", rate=flood * capacity, for_s=for_s, seed=3, client="k2/h/2")
        world.run()
        assert not any(world.served[name].refused for name in mine), "the flood pushed the other key out"
        settled = (world.served[name] for name in mine if world.served[name].asked_s > 4 * REQUEST_S)
        return [each.ttft_s for each in settled]

    alone, flooded = ttft(0.0), ttft(5.0)
    assert len(alone) == len(flooded) >= 20
    for part in (0.5, 0.75):
        assert quantile(flooded, part) < 2.0 * quantile(alone, part)


@pytest.mark.case("fairness")
def test_the_places_that_a_key_claims_cost_the_flood_of_another_at_most_a_twentieth_of_its_answers() -> None:
    """Against the same load whose requests all have one key, and therefore claim no place."""

    def num_answers(client: str) -> int:
        world = fleet(max_running_requests=8, max_queued_requests=48)
        load(world, "mine", rate=0.3 * CAPACITY / 2, for_s=FOR_S, client=client)
        flood = load(world, "flood", rate=5.0 * CAPACITY / 2, for_s=FOR_S, seed=3, client="k2/h/2")
        world.run()
        claims = sum(worker.scheduler.status().totals["claims"] for worker in world.workers)
        assert (claims > 0) is (client != "k2/h/1")
        return sum((world.served[name].ended_s or FOR_S) < FOR_S and not world.served[name].refused for name in flood)

    assert num_answers("k1/h/1") > 0.95 * num_answers("k2/h/1")


@pytest.mark.case("fairness")
def test_keys_get_places_by_their_weights() -> None:
    world = fleet(max_queued_requests=200, max_queue_wait_s=1e9, queue_timeout_s=1e9)
    heavy = load(world, "heavy", rate=4 * CAPACITY, for_s=FOR_S, client="k1:3/h/1")
    light = load(world, "light", rate=4 * CAPACITY, for_s=FOR_S, seed=2, client="k2/h/1")
    world.run()

    def num_first_tokens(names: list[str]) -> int:
        times = (world.served[name].first_token_s for name in names)
        return sum(2.0 < time_s < FOR_S for time_s in times if time_s is not None)

    assert num_first_tokens(heavy) / num_first_tokens(light) == pytest.approx(3.0, rel=0.1)


def test_urgent_requests_keep_their_time_to_first_token_in_a_flood_of_others() -> None:
    def ttft(policy: str) -> float:
        world = fleet(scheduling_policy=policy, max_queued_requests=32)
        urgent = load(world, "urgent", rate=0.2 * CAPACITY, for_s=FOR_S, priority=-1)
        load(world, "other", rate=5 * CAPACITY, for_s=FOR_S, seed=2)
        world.run()
        return quantile((world.served[n].ttft_s for n in urgent if not world.served[n].refused), 0.9)

    by_priority, in_turn = ttft(PRIORITY), ttft("fcfs")
    assert by_priority < 6 * STEP_S
    assert in_turn > 3 * by_priority


def test_an_urgent_request_displaces_another_at_a_worker_that_is_full_by_the_gateway_s_count() -> None:
    world = fleet(scheduling_policy=PRIORITY, max_queued_requests=8)
    prompts = [[number] * NUM_PROMPT for number in range(25)]
    for number in range(24):  # 16 places and 8 in the queue
        world.submit(make_request(f"r{number}", prompts[number], max_tokens=9, ignore_eos=True), at_s=0.0)
    world.submit(make_request("urgent", prompts[24], max_tokens=9, ignore_eos=True, priority=-1), at_s=0.05)
    world.run()
    refused = [name for name, each in world.served.items() if each.refused]
    assert refused == ["r23"], "the newest of the others"
