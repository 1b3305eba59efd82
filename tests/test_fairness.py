"""Turns among callers, for any order of arrivals and departures."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.fairness import CallerCounts, CallerPath, FairQueue, caller_path, weight_of, weighted_name

CALLERS = st.tuples(st.sampled_from("kl"), st.sampled_from("hi"), st.sampled_from("123"))


def test_a_caller_path_has_three_names_and_missing_ones_are_empty() -> None:
    assert [caller_path(tag) for tag in ("", "k", "k/h", "k/h/c", "k/h/c/more")] == [
        ("", "", ""),
        ("k", "", ""),
        ("k", "h", ""),
        ("k", "h", "c"),
        ("k", "h", "c"),
    ]


@given(st.lists(st.one_of(CALLERS, st.sampled_from(["take", "remove"])), max_size=60))
def test_a_fair_queue_serves_every_caller_within_a_round_and_loses_no_item(script: list[object]) -> None:
    turns: FairQueue[tuple[CallerPath, int]] = FairQueue(lambda item: item[1])
    waiting: list[tuple[CallerPath, int]] = []
    passed: Counter[tuple[str, ...]] = Counter()  # turns of rivals since a waiting caller had its own
    numbers = count()
    for event in script:
        if isinstance(event, tuple):
            item = (event, next(numbers))
            turns.add(event, item)
            waiting.append(item)
        elif waiting and event == "remove":
            item = waiting.pop(len(waiting) // 2)
            turns.remove(item[0], item)
        elif waiting:
            head = turns.head()
            assert head is not None
            item = head
            caller = item[0]
            assert item == min((each for each in waiting if each[0] == caller), key=lambda each: each[1])
            turns.take(caller, item)
            waiting.remove(item)
            for level in (1, 2, 3):
                rivals = {each[0][:level] for each in waiting if each[0][: level - 1] == caller[: level - 1]}
                for rival in rivals - {caller[:level]}:
                    passed[rival] += 1
                    most = {1: 1, 2: 1, 3: 2}[level]
                    assert passed[rival] <= most, "a rival of the same level had more turns than its share"
                passed.pop(caller[:level], None)
        # a caller that leaves and returns comes last in the round: its count starts again
        passed = Counter({path: num for path, num in passed.items() if any(w[0][: len(path)] == path for w in waiting)})
        assert sorted(turns, key=str) == sorted(waiting, key=str)
    assert (turns.head() is None) == (not waiting)


@given(st.lists(CALLERS, min_size=1, max_size=12), CALLERS)
def test_two_callers_never_displace_each_other_in_turn(places: list[CallerPath], newcomer: CallerPath) -> None:
    counts_of = _counts(places)
    loser = counts_of.displaced_by(newcomer)
    if loser is None:
        for level in (1, 2, 3):
            counts = Counter(path[:level] for path in places if path[: level - 1] == newcomer[: level - 1])
            assert max(counts.values(), default=0) <= counts[newcomer[:level]] + 1
        return
    assert loser in places
    counts_of.remove(loser)
    counts_of.add(newcomer)
    assert counts_of.displaced_by(loser) != newcomer
    for caller in [*places, newcomer]:
        if caller != loser:
            counts_of.remove(caller)
    for _ in range(places.count(loser) + (newcomer == loser) - 1):
        counts_of.remove(loser)
    assert not counts_of._below, "callers without places are still counted"


def test_the_busiest_connection_of_the_busiest_host_of_a_key_is_displaced() -> None:
    places = [("k", "h", "1"), ("k", "i", "2"), ("k", "i", "3"), ("k", "i", "3"), ("l", "h", "4")]
    counts = _counts(places)
    assert counts.displaced_by(("m", "x", "9")) == ("k", "i", "3")
    assert counts.displaced_by(("l", "h", "4")) == ("k", "i", "3")
    assert counts.displaced_by(("k", "h", "1")) == ("k", "i", "3")
    assert counts.displaced_by(("k", "i", "3")) is None


def _counts(places: list[CallerPath]) -> CallerCounts:
    counts = CallerCounts()
    for caller in places:
        counts.add(caller)
    return counts


WEIGHTED = st.tuples(st.sampled_from(["k", "l:2", "m:5"]), st.sampled_from("hi"), st.sampled_from("12"))


def test_the_weight_of_a_key_is_read_from_its_name() -> None:
    names = ["", "k", weighted_name("k", 1), weighted_name("k", 7), "k:", "k:x", "k:0", "k:99999", "k:1001", "k:²"]
    assert [weight_of(name) for name in names] == [1, 1, 1, 7, 1, 1, 1, 1, 1000, 1]


@given(st.lists(st.sampled_from(["k", "l:2", "m:5"]), min_size=30, max_size=200))
def test_waiting_keys_get_turns_by_their_weights(arrivals: list[str]) -> None:
    """While all three keys wait, no key is more than one turn of its own away from its share."""
    turns: FairQueue[tuple[str, int]] = FairQueue(lambda item: item[1])
    for number, key in enumerate(arrivals):
        turns.add((key, "h", "1"), (key, number))
    left, taken = Counter(arrivals), Counter[str]()
    while min(left[key] for key in ("k", "l:2", "m:5")) > 0:
        item = turns.head()
        assert item is not None
        turns.take((item[0], "h", "1"), item)
        left[item[0]] -= 1
        taken[item[0]] += 1
        rounds = [taken[key] / weight_of(key) for key in ("k", "l:2", "m:5")]
        assert max(rounds) - min(rounds) <= 1.0 + 1e-9


@given(st.lists(WEIGHTED, min_size=1, max_size=14), WEIGHTED)
def test_two_weighted_callers_never_displace_each_other_in_turn(places: list[CallerPath], newcomer: CallerPath) -> None:
    counts = _counts(places)
    loser = counts.displaced_by(newcomer)
    if loser is not None:
        counts.remove(loser)
        counts.add(newcomer)
        assert counts.displaced_by(loser) != newcomer


@given(st.lists(CALLERS, max_size=14), CALLERS)
def test_the_number_ahead_is_the_number_of_turns_before_a_newcomer(
    places: list[CallerPath], newcomer: CallerPath
) -> None:
    """In a queue that has taken no turn, and whose newcomer comes last in each round."""
    turns: FairQueue[tuple[CallerPath, int]] = FairQueue(lambda item: item[1])
    for number, caller in enumerate(
        sorted(places, key=lambda each: [a == b for a, b in zip(each, newcomer, strict=True)])
    ):
        turns.add(caller, (caller, number))
    last = (newcomer, len(places))
    turns.add(newcomer, last)
    num_before = 0
    while (item := turns.head()) != last:
        assert item is not None
        turns.take(item[0], item)
        num_before += 1
    assert _counts(places).num_ahead(newcomer) == pytest.approx(num_before, abs=1)
