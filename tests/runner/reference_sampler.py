"""A plain sampler, written from the definitions: one row, one token after the other, in Python.

The samplers under test share nothing with it except the noise, which is part of the definition of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvist.kernels.sampling import gumbel_noise
from kvist.request import SamplingParams
from kvist.runner.sampler import noise_key_words

F = np.float32
NEG_INF = F("-inf")


def shaped_logits(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int], suppressed: set[int]
) -> list[np.float32]:
    """Return the logits of the next token after everything but temperature and truncation, in fp32."""
    values = [F(value) for value in logits]
    tokens = [*prompt, *output]
    for token in range(len(values)):
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            values[token] = NEG_INF
        if token in suppressed:
            values[token] = NEG_INF
    for *before, last in params.bad_words:
        if not before or tokens[-len(before) :] == before:
            values[last] = NEG_INF
    for token, bias in params.logit_bias:
        values[token] += F(bias)
    for token in set(tokens):
        if values[token] > 0:
            values[token] /= F(params.repetition_penalty)
        else:
            values[token] *= F(params.repetition_penalty)
    for token in set(output):
        values[token] -= F(params.frequency_penalty) * F(output.count(token))
        values[token] -= F(params.presence_penalty)
    return values


def kept_tokens(values: Sequence[np.float32], params: SamplingParams) -> set[int]:
    """Return the tokens left by top_k, top_p and min_p. Tokens as likely as the least likely kept one are kept."""
    best = max(values)
    weights = {t: np.exp(np.float64(v - best) / params.temperature) for t, v in enumerate(values) if v > NEG_INF}
    order = sorted(weights, key=lambda t: -values[t])
    if 0 < params.top_k < len(order):
        order = [t for t in order if values[t] >= values[order[params.top_k - 1]]]
    if params.top_p < 1:
        total, mass = sum(weights[t] for t in order), 0.0
        for token in order:
            mass += weights[token]
            if mass >= params.top_p * total:
                order = [t for t in order if values[t] >= values[token]]
                break
    return {t for t in order if weights[t] >= params.min_p}


def next_token(
    logits: Sequence[float],
    params: SamplingParams,
    *,
    prompt: Sequence[int],
    output: Sequence[int],
    suppressed: set[int] = frozenset(),  # type: ignore[assignment]
) -> int | None:
    """Return the token after prompt and output; None: no token is possible."""
    values = shaped_logits(logits, params, prompt, output, suppressed)
    best = max(values)
    if best == NEG_INF:
        return None
    if params.greedy:
        return values.index(best)
    keys = torch.from_numpy(noise_key_words([params.seed], [len(prompt) + len(output)]))
    noise = gumbel_noise(keys, torch.arange(len(values))[None, :])[0].tolist()
    scores = {t: (values[t] - best) / F(params.temperature) + F(noise[t]) for t in kept_tokens(values, params)}
    return max(sorted(scores), key=lambda t: scores[t])
