"""Samples tokens: argmax(logits / temperature + Gumbel noise), where the noise is a hash of (row key, token id).

A row's key is 64 bits that the caller derives from (seed, position); the hash takes it as two words. The hash has
the same bits on every device, so a stream may continue on another device; the logarithms may differ in the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvist.kernels.operands import SamplingColumns, ShapedRows
from kvist.kernels.shaping import record_tokens_torch, shape_logits_torch
from kvist.kernels.truncation import truncation_floors_torch

_NEG_INF = float("-inf")
NO_TOKEN = -1  # the result for a row whose logits have NaN or an infinite maximum


def _signed_32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def hash_tokens(keys: Tensor, token_ids: Tensor) -> Tensor:
    """keys [num_rows, 2] int32, token_ids [num_rows or 1, n] -> [num_rows, n] int32, 31 random bits each.

    32-bit arithmetic that wraps: half the memory traffic of 64 bits, and vectorised on every CPU. The row's 64-bit key
    enters as two words in different rounds, so that no two rows get the same noise in a different order.
    """
    low, high = keys.T[:, :, None]
    hashed = (token_ids.to(torch.int32) * _signed_32(0x9E3779B1)) ^ low
    hashed.bitwise_xor_((hashed >> 16).bitwise_and_(0xFFFF)).mul_(_signed_32(0x85EBCA6B))
    hashed.bitwise_xor_((hashed >> 13).bitwise_and_(0x7FFFF)).add_(high).mul_(_signed_32(0xC2B2AE35))
    hashed.bitwise_xor_((hashed >> 16).bitwise_and_(0xFFFF)).mul_(_signed_32(0x27D4EB2F))
    hashed.bitwise_xor_((hashed >> 15).bitwise_and_(0x1FFFF))
    bits: Tensor = hashed.bitwise_and_(0x7FFFFFFF)
    return bits


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise [num_rows, n], fp32; arguments as for `hash_tokens`."""
    # 31 bits as v in (0, 1). -log1p(-v) is exponential, and exact where precision matters: near 0, where noise is
    # large.
    uniform = hash_tokens(keys, token_ids).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    noise: Tensor = uniform.neg_().log1p_().neg_().log_().neg_()
    return noise


def choose_tokens(logits: Tensor, columns: SamplingColumns, shaped: ShapedRows | None = None) -> Tensor:
    """Return [num_rows] int64: for each row the token with the largest logit / temperature + noise among the tokens
    that truncation keeps, the first of equals. NO_TOKEN for a row with NaN, an infinite maximum or no possible token,
    so that the caller need not inspect the logits.

    logits [num_rows, vocab_size] fp32 or bf16, -inf is never sampled. With `shaped`, the logits are shaped before, in
    place, and the tokens are recorded in the tables. Needs no host: it may be captured into a graph.
    """
    if not logits.is_cuda:
        return choose_tokens_torch(logits, columns, shaped)
    from kvist.kernels.gpu import sampling

    return sampling.choose_tokens(logits, columns, shaped)


def choose_tokens_torch(logits: Tensor, columns: SamplingColumns, shaped: ShapedRows | None = None) -> Tensor:
    if shaped is not None:
        logits.copy_(shape_logits_torch(logits, shaped))
    values = logits.float()
    # Shift the likeliest token to 0, so that a tiny temperature does not overflow.
    shifted = values - values.amax(dim=-1, keepdim=True)
    greedy = columns.temperatures[:, None] == 0
    scaled = shifted / torch.where(greedy, 1.0, columns.temperatures[:, None])
    scaled = scaled.masked_fill(shifted < truncation_floors_torch(shifted, columns), _NEG_INF)
    token_ids = torch.arange(logits.shape[1], device=logits.device)[None, :]
    chosen = torch.where(greedy, shifted, scaled + gumbel_noise(columns.keys, token_ids)).argmax(dim=-1)
    chosen = without_broken_rows(chosen, values)
    if shaped is not None:
        record_tokens_torch(chosen, shaped)
    return chosen


def without_broken_rows(chosen: Tensor, logits: Tensor) -> Tensor:
    """Return `chosen` [num_rows], with NO_TOKEN where the row of `logits` has NaN or an infinite maximum."""
    return chosen.masked_fill(~logits.amax(dim=-1).isfinite(), NO_TOKEN)  # amax keeps NaN
