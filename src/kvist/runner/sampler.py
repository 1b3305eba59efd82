"""Chooses the next tokens: a pure function of (logits, parameters, seed, position), row by row.

The order is: suppress, temperature, top_k, top_p, min_p, then argmax(logits + Gumbel noise), which draws from the
softmax of what is left. The noise of a token is a hash of (seed, position, token id), never generator state: so the
same row gives the same token in any batch, on any worker, after any interruption.

Rows that share the same kind of work are done together: greedy rows are one argmax; without truncation there is no
sort; top_k looks at k tokens; top_p looks at the likeliest few hundred, and at the whole vocabulary only for a row
whose nucleus is wider than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvist.kernels.sampling import gumbel_noise as hashed_noise
from kvist.request import SampledToken, SamplingParams, TokenLogprobs

_NUCLEUS_FIRST_TRY = 256  # tokens
_NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    params: SamplingParams
    position: int  # of the token to be chosen; the counter of its noise
    suppressed_token_ids: tuple[int, ...] = ()


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """One token for each row of `logits` [num_rows, vocab_size], fp32. Leaves `logits` as they are."""
    assert logits.shape[0] == len(rows)
    if all(row.params.greedy and not row.suppressed_token_ids for row in rows):
        chosen: list[int] = logits.argmax(dim=-1).tolist()
    else:
        chosen = _choose(_suppress(logits, rows), rows)
    logprobs = _logprobs(logits, rows, chosen)
    return [SampledToken(token_id=token, logprobs=probs) for token, probs in zip(chosen, logprobs, strict=True)]


def _suppress(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    vocab_size = logits.shape[1]
    # A stop token id may be any integer the client likes; one outside the vocabulary cannot be chosen anyway.
    pairs = [(i, t) for i, row in enumerate(rows) for t in row.suppressed_token_ids if 0 <= t < vocab_size]
    if not pairs:
        return logits
    index = torch.tensor(pairs, dtype=torch.int64, device=logits.device)
    suppressed = logits.clone()
    suppressed[index[:, 0], index[:, 1]] = _NEG_INF
    return suppressed


@dataclass(frozen=True, slots=True)
class _Kind:
    """Rows of one kind are computed together. top_k is exact, not a maximum over rows: ties at the k-th place must not
    fall differently because of who else is in the batch."""

    greedy: bool
    top_k: int = 0
    nucleus: bool = False


def _kind(row: SamplingRow, vocab_size: int) -> _Kind:
    params = row.params
    if params.greedy:
        return _Kind(greedy=True)
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    return _Kind(greedy=False, top_k=top_k, nucleus=params.top_p < 1.0)


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    members: dict[_Kind, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(_kind(row, logits.shape[1]), []).append(index)
    chosen = [0] * len(rows)
    for kind, indices in members.items():
        part = logits if len(indices) == len(rows) else logits[indices]
        tokens = part.argmax(dim=-1) if kind.greedy else _draw(part, kind, [rows[i] for i in indices])
        for index, token in zip(indices, tokens.tolist(), strict=True):
            chosen[index] = token
    return chosen


def _draw(logits: Tensor, kind: _Kind, rows: Sequence[SamplingRow]) -> Tensor:
    """[num_rows] token ids, for rows that are all of `kind`."""
    # The likeliest token is at 0, whatever the temperature: no overflow for tiny ones.
    temperature = _column([row.params.temperature for row in rows], logits)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if kind.nucleus and not kind.top_k:
        return _draw_from_nucleus(scaled, rows)
    if not kind.top_k:
        return _pick(scaled, _all_tokens(scaled), rows)
    values, token_ids = scaled.topk(kind.top_k, dim=-1)
    if kind.nucleus:
        values = _cut_nucleus(values, values.logsumexp(dim=-1, keepdim=True), rows)
    return _pick(values, token_ids, rows)


def _draw_from_nucleus(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    log_total = scaled.logsumexp(dim=-1, keepdim=True)
    values, token_ids = scaled.topk(min(_NUCLEUS_FIRST_TRY, scaled.shape[1]), dim=-1)
    tokens = _pick(_cut_nucleus(values, log_total, rows), token_ids, rows)
    if values.shape[1] == scaled.shape[1]:
        return tokens
    covered = (values - log_total).exp().sum(dim=-1).tolist()
    wide = [i for i, (mass, row) in enumerate(zip(covered, rows, strict=True)) if mass < row.params.top_p]
    if wide:
        wide_rows = [rows[i] for i in wide]
        probabilities = (scaled[wide] - log_total[wide]).exp()
        outside = probabilities < _nucleus_floor(probabilities, wide_rows)
        tokens[wide] = _pick(scaled[wide].masked_fill(outside, _NEG_INF), _all_tokens(scaled), wide_rows)
    return tokens


def _nucleus_floor(probabilities: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """[num_rows, 1] the probability of the least likely token in each row's nucleus.

    Bisection over the bit patterns, which order non-negative floats: 30 sums, half the time of a sort on a CPU.
    """
    top_p = _column([row.params.top_p for row in rows], probabilities)
    # Invariant: the tokens at or above `low` have top_p together, those at or above `high` have less.
    low = torch.zeros_like(top_p, dtype=torch.int32)
    high = (probabilities.amax(dim=-1, keepdim=True)).view(torch.int32) + 1
    for _ in range(30):
        middle = low + (high - low) // 2
        reached = probabilities.where(probabilities >= middle.view(torch.float32), 0).sum(dim=-1, keepdim=True) >= top_p
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    return low.view(torch.float32)


def _all_tokens(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device)[None, :]


def _pick(values: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """min_p, noise, argmax. `values` [num_rows, n] of `token_ids` [num_rows or 1, n]; -inf is impossible."""
    if any(row.params.min_p > 0 for row in rows):
        floors = [math.log(row.params.min_p) if row.params.min_p > 0 else _NEG_INF for row in rows]
        values = values.masked_fill(values < _column(floors, values), _NEG_INF)
    best = (values + gumbel_noise(rows, token_ids)).argmax(dim=-1, keepdim=True)
    return token_ids.expand(values.shape).gather(1, best).squeeze(1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _cut_nucleus(values: Tensor, log_total: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """`values` sorted from likeliest; keeps the fewest whose probability reaches top_p, at least one."""
    probabilities = (values - log_total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    cut = before >= _column([row.params.top_p for row in rows], values)
    cut[:, 0] = False
    return values.masked_fill(cut, _NEG_INF)


# ---------------------------------------------------------------- noise

_MASK_64 = (1 << 64) - 1


def _mix_64(value: int) -> int:
    """The splitmix64 finaliser: every input bit changes every output bit half the time."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def noise_keys(rows: Sequence[SamplingRow], device: torch.device) -> Tensor:
    """[num_rows, 2] int32: the low and the high word of each row's 64-bit key."""
    keys = [_mix_64(_mix_64(row.params.seed ^ 0x9E3779B97F4A7C15) + row.position) for row in rows]
    return torch.from_numpy(np.array(keys, dtype="<u8").view("<i4").reshape(-1, 2)).to(device)


def gumbel_noise(rows: Sequence[SamplingRow], token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise [num_rows, n] for `token_ids` [num_rows or 1, n]; a hash, the same bits everywhere."""
    return hashed_noise(noise_keys(rows, token_ids.device), token_ids)


# ---------------------------------------------------------------- logprobs


def _logprobs(logits: Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int]) -> Sequence[TokenLogprobs | None]:
    """Of the model's own distribution: before suppression, temperature and truncation."""
    wanted = [(i, row.params.num_logprobs) for i, row in enumerate(rows) if row.params.num_logprobs is not None]
    result: list[TokenLogprobs | None] = [None] * len(rows)
    if not wanted:
        return result
    indices = [i for i, _ in wanted]
    logprobs = logits[indices].log_softmax(dim=-1)
    tokens = torch.tensor([[chosen[i]] for i in indices], device=logits.device)
    of_chosen = logprobs.gather(1, tokens).squeeze(1).tolist()
    top_values, top_ids = logprobs.topk(min(max(n for _, n in wanted), logits.shape[1]), dim=-1)
    for (i, n), logprob, values, ids in zip(wanted, of_chosen, top_values.tolist(), top_ids.tolist(), strict=True):
        result[i] = TokenLogprobs(logprob=logprob, top_token_ids=tuple(ids[:n]), top_logprobs=tuple(values[:n]))
    return result
