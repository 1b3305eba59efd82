"""Decides between the choices of a `select` from the log probabilities of their tokens.

The methods are those of SGLang's documentation; the unconditional one is from Holtzman et al., "Surface Form
Competition" (2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class ChoicesMethod(StrEnum):
    TOKEN_LENGTH_NORMALIZED = "token_length_normalized"
    GREEDY_TOKEN_SELECTION = "greedy_token_selection"
    UNCONDITIONAL_LIKELIHOOD_NORMALIZED = "unconditional_likelihood_normalized"

    @property
    def needs_unconditional(self) -> bool:
        return self is ChoicesMethod.UNCONDITIONAL_LIKELIHOOD_NORMALIZED


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredChoice:
    """The tokens of one choice. `unconditional`: their log probabilities without the prompt; empty if not asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    unconditional: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    index: int
    scores: tuple[float, ...]  # one for each choice, higher is better


def decide(
    scored: Sequence[ScoredChoice], method: ChoicesMethod, *, temperature: float | None = None, draw: float = 0.0
) -> Decision:
    """Return the chosen index. With a temperature, `draw` in [0, 1) decides between the choices' probabilities."""
    if method is ChoicesMethod.GREEDY_TOKEN_SELECTION:
        scores = _greedy_scores(scored)
    elif method is ChoicesMethod.UNCONDITIONAL_LIKELIHOOD_NORMALIZED:
        scores = [_mean(one.logprobs) - _mean(one.unconditional) for one in scored]
    else:
        scores = [_mean(one.logprobs) for one in scored]
    if temperature:
        return Decision(index=_drawn(scores, temperature, draw), scores=tuple(scores))
    return Decision(index=scores.index(max(scores)), scores=tuple(scores))


def _mean(logprobs: Sequence[float]) -> float:
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf


def _greedy_scores(scored: Sequence[ScoredChoice]) -> list[float]:
    """Follow the likeliest token at each position until one choice is left. A choice that leaves the path gets no
    better score than those that stay; a choice whose tokens are a beginning of the others' gets the mean of its own
    for the positions that it lacks."""
    scores = [0.0] * len(scored)
    left = list(range(len(scored)))
    for position in range(max(len(one.token_ids) for one in scored)):
        values = {
            index: one.logprobs[position] if position < len(one.logprobs) else _mean(one.logprobs)
            for index, one in ((index, scored[index]) for index in left)
        }
        best = max(values.values())
        kept = [index for index in left if values[index] == best]
        for index in kept:
            scores[index] += 1.0
        left = kept
        if len(left) == 1:
            break
    return scores


def _drawn(scores: Sequence[float], temperature: float, draw: float) -> int:
    most = max(scores)
    weights = [math.exp((score - most) / temperature) for score in scores]
    remaining = draw * sum(weights)
    for index, weight in enumerate(weights):
        remaining -= weight
        if remaining < 0:
            return index
    return len(weights) - 1
