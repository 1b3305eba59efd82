"""The head of the queue claims the place and the pages of requests of other keys, or of higher `priority` values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.request import FCFS, PRIORITY, EngineRequest, RequestId
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config
from tests.budget import budget

LEAST_PROGRESS = 16


def unified(num_places: int = 4, num_pages: int = 60, **config: Any) -> SimEngine:
    limits = {"max_running_requests": num_places, "max_queued_requests": 40, "chunked_prefill_size": 60, **config}
    return SimCluster().start(
        "u", config=small_config(**{"max_model_len": 60, "max_prefill_tokens": 60, **limits}), num_pages=num_pages
    )


def asked(name: str, key: str = "k", num_tokens: int = 4, **fields: Any) -> EngineRequest:
    prompt = [ord(char) % 20 for char in name] + [len(name)] * (num_tokens - len(name))
    return sim_request(name, prompt, client=f"{key}/h/1", ignore_eos=True, **{"max_tokens": 30, **fields})


def submit(engine: SimEngine, *requests: EngineRequest) -> None:
    for request in requests:
        engine.world.submit(request, engine)
        engine.world.deliver(("gateway", engine.name))


def step(engine: SimEngine, times: int = 1) -> None:
    for _ in range(times):
        engine.finish_step()
        engine.step()


def live(engine: SimEngine, name: str) -> ActiveRequest:
    return engine.scheduler.requests.live[RequestId(name)]


def num_claims(engine: SimEngine) -> float:
    return engine.scheduler.status().totals["claims"]


def settle(engine: SimEngine) -> None:
    engine.world.settle(max_rounds=2000)
    engine.world.check_settled()  # every stream is that of an undisturbed engine


@pytest.mark.parametrize("overlap", [False, True])
def test_a_key_below_its_share_gets_the_place_of_the_youngest_request_of_the_key_with_the_most(overlap: bool) -> None:
    engine = unified(overlap=overlap)
    submit(engine, *(asked(f"flood{number}") for number in range(9)))
    step(engine, 3)
    submit(engine, asked("mine", "l"))
    step(engine, 1 + overlap)  # with overlap the step before still writes the pages of the victim
    assert sorted(engine.running) == ["flood0", "flood1", "flood2", "mine"]
    submit(engine, asked("mine2", "l"), asked("mine3", "l"))
    step(engine, 1 + overlap)
    assert sorted(engine.running) == ["flood0", "flood1", "mine", "mine2"], "then both keys have half of the places"
    assert num_claims(engine) == 2
    settle(engine)


def test_a_key_has_places_by_its_weight() -> None:
    engine = unified()
    submit(engine, *(asked(f"flood{number}") for number in range(9)))
    step(engine)
    submit(engine, *(asked(f"mine{number}", "l:3") for number in range(4)))
    step(engine)
    assert sorted(engine.running) == ["flood0", "mine0", "mine1", "mine2"]
    settle(engine)


def test_a_request_that_lost_its_place_is_the_first_of_its_key_and_then_keeps_its_place_for_a_while() -> None:
    engine = unified(num_places=2)
    submit(engine, *(asked(f"flood{number}") for number in range(4)))
    step(engine, 2)
    submit(engine, asked("mine", "l", max_tokens=2))
    step(engine)
    assert sorted(engine.running) == ["flood0", "mine"]
    step(engine, 2)
    assert sorted(engine.running) == ["flood0", "flood1"]
    victim = live(engine, "flood1")
    num_tokens = len(victim.token_ids)
    submit(engine, asked("mine2", "l", max_tokens=2))
    step(engine)
    assert sorted(engine.running) == ["flood1", "mine2"], "the older one loses its place: flood1 keeps its own"
    while victim.state is RequestState.RUNNING and len(victim.token_ids) < num_tokens + LEAST_PROGRESS:
        submit(engine, asked(f"more{len(victim.token_ids)}", "l", max_tokens=2))
        step(engine)
    assert len(victim.token_ids) >= num_tokens + LEAST_PROGRESS
    settle(engine)


def test_a_lower_priority_value_takes_the_place_of_a_higher_one_and_equal_ones_of_a_key_wait() -> None:
    engine = unified(num_places=2, scheduling_policy=PRIORITY)
    submit(engine, asked("a", priority=3), asked("b", priority=5))
    step(engine, 2)
    submit(engine, asked("c", priority=3), asked("d", "l", priority=7))
    step(engine)
    assert sorted(engine.running) == ["a", "c"], "d has another key, but no lower value"
    submit(engine, asked("e", priority=3))
    step(engine)
    assert sorted(engine.running) == ["a", "c"]
    settle(engine)


def test_the_pages_of_several_requests_are_claimed_and_none_if_they_are_too_few() -> None:
    engine = unified(num_places=8, num_pages=20)
    submit(engine, *(asked(f"flood{number}", num_tokens=30, max_tokens=4) for number in range(2)))
    step(engine)
    submit(engine, asked("large", "l", num_tokens=56, max_tokens=4))
    step(engine, 2)
    assert num_claims(engine) == 0, "one of the two has too few pages, and the flood keeps the other one"
    settle(engine)
    submit(engine, *(asked(f"next{number}", num_tokens=12, max_tokens=20) for number in range(5)))
    step(engine)
    submit(engine, asked("middle", "l", num_tokens=20, max_tokens=4))
    step(engine, 2)
    assert "middle" in engine.running
    assert num_claims(engine) == 2
    settle(engine)


def test_a_page_for_one_key_is_taken_from_the_key_with_the_most_places() -> None:
    engine = unified(num_places=4, num_pages=8, max_model_len=32)
    submit(engine, *(asked(f"flood{number}", num_tokens=4, max_tokens=12) for number in range(3)))
    submit(engine, asked("mine", "l", num_tokens=4, max_tokens=12))
    while not len(engine.scheduler.requests.waiting):
        step(engine)
    (preempted,) = engine.scheduler.requests.waiting
    assert preempted.request_id == "flood2", "mine is younger, but the only one of its key"
    settle(engine)


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 4),  # steps before it
        st.sampled_from(["k", "l", "m:3"]),
        st.integers(1, 24),  # prompt
        st.integers(1, 36),  # answer
        st.sampled_from([0, 0, 0, -2, 3]),
    ),
    min_size=3,
    max_size=24,
)


def run(requests: list[tuple[int, str, int, int, int]], keys: list[str] | None = None, **limits: Any) -> SimEngine:
    engine = unified(**limits)
    for number, (num_steps, key, num_prompt, num_answer, priority) in enumerate(requests):
        step(engine, num_steps)
        name, key = f"r{number}", keys[number % len(keys)] if keys else key
        fields = {"max_tokens": num_answer, "priority": priority, "seed": number}
        submit(engine, asked(name, key, num_prompt, **fields))
    settle(engine)
    return engine


@settings(max_examples=budget(20, long=400))
@given(
    requests=REQUESTS,
    num_places=st.integers(1, 5),
    num_pages=st.integers(16, 40),
    overlap=st.booleans(),
    policy=st.sampled_from([FCFS, PRIORITY]),
)
def test_every_request_ends_and_claims_are_bounded_by_the_sampled_tokens(
    requests: list[tuple[int, str, int, int, int]], num_places: int, num_pages: int, overlap: bool, policy: str
) -> None:
    limits: dict[str, Any] = {
        "num_places": num_places,
        "num_pages": num_pages,
        "overlap": overlap,
        "scheduling_policy": policy,
    }
    engine = run(requests, **limits)
    assert num_claims(engine) <= sum(1 + num_answer // LEAST_PROGRESS for _, _, _, num_answer, _ in requests)


@settings(max_examples=budget(10, long=200))
@given(requests=REQUESTS, num_places=st.integers(1, 5), overlap=st.booleans())
def test_requests_of_one_key_take_no_place_from_each_other(
    requests: list[tuple[int, str, int, int, int]], num_places: int, overlap: bool
) -> None:
    engine = run(requests, ["k"], num_places=num_places, num_pages=20, overlap=overlap)
    assert num_claims(engine) == 0
