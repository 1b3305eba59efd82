"""Samples the next tokens on a CPU: a pure function of (logits, parameters, seed, tokens so far), row by row.

The order is: bans, bias and penalties (kernels/shaping.py), temperature, top_k, top_p, min_p, then argmax(logits +
Gumbel noise), which draws from the softmax of the remaining tokens. The noise of a token is a hash of (seed, position,
token id), never generator state. A row thus gives the same token in any batch, on any worker, after any interruption.
A GPU samples by the same rules (kernels/sampling.py).

Truncation keeps every token that is as likely as the least likely token to keep (kernels/truncation.py), so the kept
tokens never depend on the order of equal logits, nor on the other rows of a batch.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.kernels.operands import SamplingColumns, ShapedRows
from kvist.kernels.sampling import gumbel_noise, without_broken_rows
from kvist.kernels.shaping import record_tokens_torch, shape_logits_torch
from kvist.kernels.truncation import floors_of_likeliest
from kvist.plan.events import SampledTokens
from kvist.request import SamplingParams
from kvist.runner.logprobs import LogprobRow, LogprobTensors, on_device, token_logprobs

_FIRST_TRIES = (256, 4096)  # tokens
_NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    params: SamplingParams
    position: int  # of the token to be sampled; also the counter of its noise


def sample(logits: Tensor, rows: Sequence[SamplingRow], shaped: ShapedRows | None = None) -> SampledTokens:
    """Sample one token for each row of `logits` [num_rows, vocab_size], fp32, and record it in the tables of `shaped`.
    Does not change `logits`."""
    chosen = choose(logits if shaped is None else shape_logits_torch(logits, shaped), rows)
    if shaped is not None:
        record_tokens_torch(chosen, shaped)
    return sampled_tokens(chosen, compute_logprobs(logits, rows, chosen))


def sampled_tokens(chosen: Tensor, logprobs: LogprobTensors | None) -> SampledTokens:
    token_ids: list[int] = chosen.tolist()
    broken = frozenset[int]()
    if token_ids and min(token_ids) < 0:  # NO_TOKEN
        broken = frozenset(place for place, token_id in enumerate(token_ids) if token_id < 0)
    return SampledTokens(
        token_ids=token_ids, logprobs={} if logprobs is None else logprobs.by_row(), invalid_rows=broken
    )


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return [num_rows] int64 token ids, NO_TOKEN for a row with NaN, an infinite maximum or no possible token."""
    assert logits.shape[0] == len(rows)
    if all(row.params.greedy for row in rows):
        return without_broken_rows(logits.argmax(dim=-1), logits)
    return without_broken_rows(_choose(logits, rows), logits)


class _Draw(enum.Enum):
    """How a row is drawn; rows that are drawn in the same way are computed together."""

    BEST = enum.auto()  # greedy: one argmax
    ALL = enum.auto()
    TRUNCATED = enum.auto()

    @classmethod
    def of(cls, params: SamplingParams) -> _Draw:
        if params.greedy:
            return cls.BEST
        truncates = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
        return cls.TRUNCATED if truncates else cls.ALL


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for draw in _Draw:
        indices = [index for index, row in enumerate(rows) if _Draw.of(row.params) is draw]
        if not indices:
            continue
        places = on_device(indices, torch.int64, logits.device)
        part = logits if len(indices) == len(rows) else logits.index_select(0, places)
        chosen.index_copy_(0, places, _draw_rows(part, [rows[i] for i in indices], draw))
    return chosen


def _draw_rows(logits: Tensor, rows: Sequence[SamplingRow], draw: _Draw) -> Tensor:
    if draw is _Draw.BEST:
        return logits.argmax(dim=-1)
    return _draw_from_all(logits, rows) if draw is _Draw.ALL else _draw_truncated(logits, rows)


def _draw_from_all(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    return _draw(_shift(logits), _all_tokens(logits), columns_of(rows, logits.device))


def _draw_truncated(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Search the tokens to keep among the few hundred likeliest tokens first, then among more."""
    shifted, columns = _shift(logits), columns_of(rows, logits.device)
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    left = torch.arange(len(rows), device=logits.device)  # the rows whose tokens to keep are not found yet
    for most in (*_FIRST_TRIES, logits.shape[1]):
        some, cut = shifted.index_select(0, left), columns.select(left)
        values, token_ids = some.topk(min(most, logits.shape[1]), dim=-1)
        floors, found = floors_of_likeliest(values, some, cut)
        picked = _draw(values.masked_fill(values < floors, _NEG_INF), token_ids, cut)
        chosen[left[found]] = picked[found]
        left = left[~found]
        if not len(left):
            break
    return chosen


def _shift(logits: Tensor) -> Tensor:
    """Shift the likeliest token to 0, so that a tiny temperature does not overflow."""
    return logits - logits.amax(dim=-1, keepdim=True)


def _all_tokens(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device)[None, :]


def _draw(values: Tensor, token_ids: Tensor, columns: SamplingColumns) -> Tensor:
    """Return the token with the largest sum of scaled logit and noise. `values` [num_rows, n]: the logits of
    `token_ids` [num_rows or 1, n]; -inf: never drawn."""
    noise = gumbel_noise(columns.keys, token_ids)
    best = (values / columns.temperatures[:, None] + noise).argmax(dim=-1, keepdim=True)
    return token_ids.expand(values.shape).gather(1, best).squeeze(1)


def columns_of(rows: Sequence[SamplingRow], device: torch.device) -> SamplingColumns:
    params = [row.params for row in rows]
    return SamplingColumns(
        temperatures=on_device([each.temperature for each in params], torch.float32, device),
        keys=noise_keys(rows, device),
        top_k=on_device([each.top_k for each in params], torch.int32, device),
        top_p=on_device([each.top_p for each in params], torch.float32, device),
        reach=on_device([min_p_reach(each) for each in params], torch.float32, device),
    )


def min_p_reach(params: SamplingParams) -> float:
    """Return the smallest difference, <= 0, from the largest logit with which min_p keeps a token."""
    return params.temperature * math.log(params.min_p) if params.min_p > 0.0 else _NEG_INF


# ---------------------------------------------------------------- noise


def noise_keys(rows: Sequence[SamplingRow], device: torch.device) -> Tensor:
    """Return the result of `noise_key_words` on the device, [num_rows, 2] int32."""
    keys = torch.from_numpy(noise_key_words([row.params.seed for row in rows], [row.position for row in rows]))
    return keys.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else keys


def noise_key_words(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.int32]:
    """Return [num_rows, 2]: the low and the high word of each row's 64-bit key, a hash of seed and position."""
    return key_words_at(hash_seeds(seeds), np.array(positions, dtype=np.uint64))


def hash_seeds(seeds: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return the part of each key that does not depend on the position."""
    return _mix_64(np.array(seeds, dtype=np.uint64) ^ np.uint64(0x9E3779B97F4A7C15))


def key_words_at(hashed_seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    keys = _mix_64(hashed_seeds + positions)
    return keys.astype("<u8", copy=False).view("<i4").reshape(-1, 2)


def _mix_64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser: every input bit changes every output bit with probability 1/2."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# ---------------------------------------------------------------- logprobs


def compute_logprobs(logits: Tensor, rows: Sequence[SamplingRow], chosen: Tensor) -> LogprobTensors | None:
    """Return the logprobs of the chosen tokens; None if no row needs logprobs."""
    wanted = [
        LogprobRow(place, row.params.num_logprobs, row.params.logprob_token_ids)
        for place, row in enumerate(rows)
        if row.params.num_logprobs is not None
    ]
    return token_logprobs(logits, wanted, chosen.clamp(min=0)) if wanted else None  # NO_TOKEN is below 0
