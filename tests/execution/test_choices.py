"""The methods of `select`, on log probabilities worked out by hand."""

from __future__ import annotations

import math

import pytest

from kvist.execution.choices import ChoicesMethod, ScoredChoice, decide


def _choice(*logprobs: float, ids: tuple[int, ...] | None = None, without: tuple[float, ...] = ()) -> ScoredChoice:
    return ScoredChoice(token_ids=ids or tuple(range(len(logprobs))), logprobs=logprobs, unconditional=without)


def test_the_mean_log_probability_does_not_favour_short_choices() -> None:
    found = decide([_choice(-1.0), _choice(-0.6, -0.6, -0.6)], ChoicesMethod.TOKEN_LENGTH_NORMALIZED)
    assert found.index == 1
    assert found.scores == pytest.approx((-1.0, -0.6))


def test_the_greedy_method_follows_the_likeliest_first_token() -> None:
    choices = [_choice(-0.5, -9.0, ids=(1, 2)), _choice(-0.7, -0.1, ids=(3, 4))]
    assert decide(choices, ChoicesMethod.GREEDY_TOKEN_SELECTION).index == 0
    assert decide(choices, ChoicesMethod.TOKEN_LENGTH_NORMALIZED).index == 1


def test_equal_first_tokens_are_decided_by_the_next_ones() -> None:
    choices = [_choice(-0.5, -2.0, ids=(1, 2)), _choice(-0.5, -1.0, ids=(1, 3)), _choice(-0.9, 0.0, ids=(4, 5))]
    assert decide(choices, ChoicesMethod.GREEDY_TOKEN_SELECTION).index == 1


def test_a_choice_that_is_a_beginning_of_another_is_compared_by_its_mean() -> None:
    choices = [_choice(-0.5, ids=(1,)), _choice(-0.5, -0.4, ids=(1, 2))]
    assert decide(choices, ChoicesMethod.GREEDY_TOKEN_SELECTION).index == 1


def test_the_unconditional_method_subtracts_what_is_likely_anyway() -> None:
    choices = [_choice(-1.0, without=(-1.0,)), _choice(-1.5, without=(-4.0,))]
    found = decide(choices, ChoicesMethod.UNCONDITIONAL_LIKELIHOOD_NORMALIZED)
    assert found.index == 1
    assert found.scores == pytest.approx((0.0, 2.5))


def test_a_temperature_draws_in_proportion_to_the_probabilities() -> None:
    choices = [_choice(math.log(0.25)), _choice(math.log(0.75))]
    picks = [
        decide(choices, ChoicesMethod.TOKEN_LENGTH_NORMALIZED, temperature=1.0, draw=n / 100).index for n in range(100)
    ]
    assert picks == [0] * 25 + [1] * 75


def test_an_impossible_choice_is_never_taken() -> None:
    choices = [_choice(-math.inf), _choice(-50.0)]
    for method in (ChoicesMethod.TOKEN_LENGTH_NORMALIZED, ChoicesMethod.GREEDY_TOKEN_SELECTION):
        assert decide(choices, method).index == 1
