"""The store of responses: bounded in number, bytes and time, and fair to API keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.agents_api.config import AgentApiOptions
from kvist.agents_api.response_store import ResponseStore, Turn
from kvist.errors import UnknownResponse
from kvist.testing.clocks import FakeClock


def turn_of(size: int = 1000, before: Turn | None = None) -> Turn:
    return Turn(before=before, input_items=b"i" * size, response=b"r")


def store_of(clock: FakeClock | None = None, **options: int | float) -> ResponseStore:
    return ResponseStore(AgentApiOptions(**options), clock or FakeClock())  # type: ignore[arg-type]


def has(store: ResponseStore, owner: str, response_id: str) -> bool:
    try:
        store.get(owner, response_id)
    except UnknownResponse:
        return False
    return True


def test_the_oldest_response_is_dropped_when_there_are_too_many() -> None:
    store = store_of(max_stored_responses=2)
    for name in "abc":
        store.put("k", name, turn_of())
    assert [has(store, "k", name) for name in "abc"] == [False, True, True]
    assert store.num_responses == 2


def test_a_key_that_fills_the_store_drops_its_own_responses() -> None:
    store = store_of(max_stored_response_bytes=20_000)
    store.put("quiet", "q", turn_of())
    for number in range(50):
        store.put("loud", str(number), turn_of())
    assert has(store, "quiet", "q")
    assert has(store, "loud", "49")
    assert store.num_bytes <= 20_000


def test_a_response_over_the_limit_is_not_kept() -> None:
    store = store_of(max_stored_response_bytes=5000)
    store.put("k", "a", turn_of(size=6000))
    assert (has(store, "k", "a"), store.num_bytes, store.num_responses) == (False, 0, 0)


def test_responses_expire() -> None:
    clock = FakeClock()
    store = store_of(clock, stored_response_ttl_s=10)
    store.put("k", "a", turn_of())
    clock.advance(9)
    store.put("k", "b", turn_of())
    assert has(store, "k", "a")
    clock.advance(1.5)
    assert [has(store, "k", name) for name in "ab"] == [False, True]
    with pytest.raises(UnknownResponse, match="--stored-response-ttl-s"):
        store.get("k", "a")


def test_turns_that_responses_share_are_counted_once_and_outlive_their_response() -> None:
    store = store_of()
    first = turn_of()
    store.put("k", "a", first)
    alone = store.num_bytes
    for name in "bc":
        store.put("k", name, turn_of(before=first))
    assert store.num_bytes == 3 * alone
    store.delete("k", "a")
    assert store.num_bytes == 3 * alone
    assert store.get("k", "b").conversation()[0] is first
    store.delete("k", "b")
    store.delete("k", "c")
    assert store.num_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 9)), max_size=60))
def test_the_bytes_are_those_of_the_turns_that_stored_responses_reach(steps: list[tuple[int, int, int]]) -> None:
    clock = FakeClock()
    store = store_of(clock, max_stored_responses=4, max_stored_response_bytes=9000, stored_response_ttl_s=20)
    held: list[tuple[str, Turn]] = []  # by requests that run: their responses may have been dropped
    stored: dict[tuple[str, str], Turn] = {}
    for number, (kind, owner, place) in enumerate(steps):
        key = f"k{owner}"
        if kind <= 3:
            own = [turn for (of, _), turn in stored.items() if of == key] + [turn for of, turn in held if of == key]
            before = own[place % len(own)] if own and place else None
            turn = turn_of(size=200 * place, before=before)
            held = [*held[-2:], (key, turn)]
            store.put(key, str(number), turn)
            stored[key, str(number)] = turn
        elif kind == 4 and stored:
            of, name = list(stored)[place % len(stored)]
            store.delete(of, name)
        else:
            clock.advance(place)
        stored = {(of, name): turn for (of, name), turn in stored.items() if has(store, of, name)}
        reached = {id(turn): turn for last in stored.values() for turn in last.conversation()}
        assert store.num_bytes == sum(turn.num_bytes for turn in reached.values()) <= 9000
        assert store.num_responses == len(stored) <= 4
