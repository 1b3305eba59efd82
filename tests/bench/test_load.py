"""Prompts, arrivals and turns follow from the seed; every turn occurs exactly once, also after failures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.bench.config import LengthRange, parse_length_range
from kvist.bench.load import DrawKind, Source, TokenHistory, Turns
from kvist.errors import ConfigError

SOURCE = Source(seed=3, vocab_low=10, vocab_high=19)


def test_a_prompt_depends_on_the_seed_and_its_place_alone() -> None:
    first = SOURCE.token_ids(50, DrawKind.PROMPT, 1, 2)
    SOURCE.token_ids(9, DrawKind.WARM_UP, 0)
    assert SOURCE.token_ids(50, DrawKind.PROMPT, 1, 2) == first
    others = [
        SOURCE.token_ids(50, DrawKind.PROMPT, 2, 1),
        Source(seed=4, vocab_low=10, vocab_high=19).token_ids(50, DrawKind.PROMPT, 1, 2),
    ]
    assert first not in others


def test_the_prompts_of_a_seed_stay_the_same_from_version_to_version() -> None:
    expected = np.random.default_rng([3, 0, 1, 2]).integers(10, 20, 50).tolist()
    assert SOURCE.token_ids(50, DrawKind.PROMPT, 1, 2) == expected
    later = Source(seed=3, vocab_low=10, vocab_high=19, scenario=1)
    assert later.token_ids(50, DrawKind.PROMPT, 1, 2)[:4] != expected[:4]


def test_token_ids_cover_the_vocabulary_range_and_nothing_else() -> None:
    assert set(SOURCE.token_ids(2000, DrawKind.PROMPT, 0)) == set(range(10, 20))


def test_lengths_are_uniform_with_both_ends() -> None:
    assert set(SOURCE.lengths(LengthRange(low=3, high=5), 200, DrawKind.INPUT_LENGTHS)) == {3, 4, 5}
    assert SOURCE.lengths(LengthRange(low=8, high=8), 3, DrawKind.INPUT_LENGTHS) == [8, 8, 8]


def test_arrivals_are_a_poisson_process_that_begins_at_once() -> None:
    times = SOURCE.arrivals_s(8.0, 4000)
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert min(gaps) >= 0
    assert np.mean(gaps) == pytest.approx(1 / 8, rel=0.06)
    assert np.std(gaps) == pytest.approx(1 / 8, rel=0.06)  # exponential gaps: as wide as their mean


@given(rate=st.floats(0.5, 300), end_s=st.floats(0.01, 3))
def test_arrivals_before_a_time_are_the_beginning_of_the_same_process(rate: float, end_s: float) -> None:
    times = SOURCE.arrivals_before_s(rate, end_s)
    longer = SOURCE.arrivals_s(rate, len(times) + 1)
    assert longer[:-1] == times
    assert times[-1] < end_s <= longer[-1]


@pytest.mark.parametrize(("text", "span"), [("128", (128, 128)), ("100-1024", (100, 1024))])
def test_lengths_are_one_number_or_two(text: str, span: tuple[int, int]) -> None:
    assert parse_length_range(text, "input_tokens") == LengthRange(low=span[0], high=span[1])


@pytest.mark.parametrize("text", ["0", "5-4", "", "1-2-3", "x", "-4"])
def test_other_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--input-tokens"):
        parse_length_range(text, "input_tokens")


@given(st.lists(st.lists(st.integers(0, 2**31), max_size=5), max_size=6))
def test_a_conversation_is_the_json_of_all_that_was_appended(pieces: list[list[int]]) -> None:
    conversation = TokenHistory()
    for piece in pieces:
        conversation.append(piece)
    whole = [token_id for piece in pieces for token_id in piece]
    assert json.loads(conversation.as_json()) == whole
    assert conversation.num_tokens == len(whole)


@given(
    clients=st.integers(1, 7),
    rounds=st.integers(1, 5),
    parallel=st.integers(1, 9),
    seed=st.integers(0, 1000),
    choices=st.data(),
)
def test_every_turn_is_started_in_order_or_given_up_exactly_once(
    clients: int, rounds: int, parallel: int, seed: int, choices: st.DataObject
) -> None:
    turns = Turns(clients=clients, rounds=rounds, parallel=parallel, generator=np.random.default_rng(seed))
    waiting: list[tuple[int, int]] = []
    seen: list[tuple[int, int]] = []
    last_started: dict[int, int] = {}
    while True:
        while (turn := turns.start()) is not None:
            client, number = turn
            assert client not in {client for client, _ in waiting}  # a client waits for its answer
            assert number == last_started.get(client, -1) + 1
            last_started[client] = number
            waiting.append(turn)
            seen.append(turn)
        assert len(waiting) == turns.num_waiting <= parallel
        if not waiting:
            break
        client, _ = waiting.pop(choices.draw(st.integers(0, len(waiting) - 1)))
        ok = choices.draw(st.booleans())
        given_up = turns.end(client, ok=ok)
        assert not (ok and given_up)
        seen += [(client, number) for number in given_up]
    assert sorted(seen) == [(client, number) for client in range(clients) for number in range(rounds)]


def test_turns_start_up_to_the_limit_in_flight() -> None:
    turns = Turns(clients=5, rounds=2, parallel=3, generator=np.random.default_rng(0))
    assert [turns.start() is None for _ in range(4)] == [False, False, False, True]


def test_turns_draw_the_next_client_in_random_order() -> None:
    orders = set()
    for seed in range(20):
        turns = Turns(clients=6, rounds=1, parallel=6, generator=np.random.default_rng(seed))
        order = tuple(turn[0] for _ in range(6) if (turn := turns.start()))
        assert sorted(order) == list(range(6))
        orders.add(order)
    assert len(orders) > 10
