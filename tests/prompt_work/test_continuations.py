"""The tokens of continuations, and the rows that score them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.prompt_work.continuations import ScorePlan, TokenIds, continuation_token_ids
from kvist.request import TokenLogprobs
from kvist.testing.tokenizers import byte_tokenizer

CONTINUATIONS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


def logprob(before: TokenIds, token_id: int) -> float:
    """Return a number that no other token after other tokens has."""
    return -float(hash((before, token_id)) % 1_000_003)


def scored(plan: ScorePlan, first_scored: int) -> list[Sequence[TokenLogprobs]]:
    """Return what an engine finds for the rows of a plan."""
    return [
        [
            TokenLogprobs(
                logprob=logprob(row[:place], row[place]),
                requested_logprobs=tuple(logprob(row[:place], each) for each in (plan.beside if not number else ())),
            )
            for place in range(first_scored, len(row))
        ]
        for number, row in enumerate(plan.rows)
    ]


@given(CONTINUATIONS)
def test_every_continuation_gets_the_logprobs_of_its_own_tokens(continuations: list[TokenIds]) -> None:
    plan = ScorePlan.of(continuations)
    for each in continuations:
        expected = [logprob(each[:place], token_id) for place, token_id in enumerate(each)]
        assert plan.logprobs(each, scored(plan, 0)) == expected
    assert len(set(plan.rows)) == len(plan.rows) <= max(1, sum(len(each) > 1 for each in set(continuations)))


@given(CONTINUATIONS)
def test_without_a_prefix_the_first_tokens_are_not_scored(continuations: list[TokenIds]) -> None:
    plan = ScorePlan.without_prefix(continuations)
    for each in continuations:
        if len(each) > 1:
            expected = [logprob(each[:place], each[place]) for place in range(1, len(each))]
            assert plan.logprobs(each, scored(plan, 1)) == expected
    assert set(plan.rows) == {each for each in continuations if len(each) > 1}


def test_continuations_of_one_token_share_one_row() -> None:
    assert ScorePlan.of([(7,), (8,), (9,)]) == ScorePlan(rows=((7,),), beside=(8, 9))
    assert ScorePlan.of([(7,), (8, 1), (7,), (9,)]) == ScorePlan(rows=((8, 1),), beside=(7, 9))


@pytest.mark.parametrize(
    ("tail", "continuation", "texts"),
    [
        ("ab", " yes", [" ", "y", "e", "s"]),
        ("x", "yz", ["yz"]),  # one token
        ("xy", "z", ["z"]),  # `yz` would change the last token of the prompt
        ("", "yz", ["yz"]),
    ],
)
def test_the_tokens_of_the_prompt_stay_as_they_are(tail: str, continuation: str, texts: list[str]) -> None:
    tokenizer = byte_tokenizer(merges=[("y", "z")])
    found = continuation_token_ids(partial(tokenizer.encode, add_special_tokens=False), tail, continuation)
    assert [tokenizer.token_text(each) for each in found] == texts


def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_into_a_word() -> None:
    vocabulary = {"▁": 1, "a": 2, "b": 3, "\n": 4, "▁a": 5, "▁ab": 6}

    def encode(text: str) -> list[int]:
        spelled, found = "▁" + text.replace(" ", "▁"), list[int]()
        while spelled:
            piece = next(each for each in sorted(vocabulary, key=len, reverse=True) if spelled.startswith(each))
            found.append(vocabulary[piece])
            spelled = spelled[len(piece) :]
        return found

    assert continuation_token_ids(encode, "b", "a") == [2]
    assert continuation_token_ids(encode, "b", " a") == [5]
    assert continuation_token_ids(encode, "a", "b") == [3], "together they would be the one token 6"
