"""Samples tokens: argmax(logits / temperature + Gumbel noise), where the noise is a hash of (row key, token id).

A row's key is 64 bits that the caller derives from (seed, position); the hash takes it as two words. The hash has
the same bits on every device, so a stream may continue on another device; the logarithms may differ in the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def choose_tokens(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """Return [num_rows] int64: for each row the token with the largest logit / temperature + noise, the first of
    equals. NO_TOKEN for a row with NaN or an infinite maximum, so that the caller need not inspect the logits.

    logits [num_rows, vocab_size] fp32 or bf16, -inf is never sampled; temperatures [num_rows] fp32, 0 is greedy;
    keys [num_rows, 2] int32, not read for greedy rows. Needs no host: it may be captured into a graph.
    """
    if not logits.is_cuda:
        return choose_tokens_torch(logits, temperatures, keys)
    from kvist.kernels.gpu import sampling

    return sampling.choose_tokens(logits, temperatures, keys)


def choose_tokens_torch(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    logits = logits.float()
    # Shift the likeliest token to 0, so that a tiny temperature does not overflow.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    greedy = temperatures[:, None] == 0
    scaled = shifted / torch.where(greedy, 1.0, temperatures[:, None])
    token_ids = torch.arange(logits.shape[1], device=logits.device)[None, :]
    chosen = torch.where(greedy, shifted, scaled + gumbel_noise(keys, token_ids)).argmax(dim=-1)
    return without_broken_rows(chosen, logits)


def without_broken_rows(chosen: Tensor, logits: Tensor) -> Tensor:
    """Return `chosen` [num_rows], with NO_TOKEN where the row of `logits` has NaN or an infinite maximum."""
    return chosen.masked_fill(~logits.amax(dim=-1).isfinite(), NO_TOKEN)  # amax keeps NaN


def nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Return [num_rows, 1]: the probability of the least likely token in each row's nucleus, the fewest tokens whose
    probabilities sum to at least `top_p`.

    probabilities [num_rows, vocab_size] fp32, contiguous; top_p [num_rows, 1] fp32; 1 keeps all tokens. Bisection over
    the bit patterns, which are ordered for non-negative floats: a few dozen sums instead of a sort of all values.
    """
    if not probabilities.is_cuda:
        return nucleus_floor_torch(probabilities, top_p)
    from kvist.kernels.gpu import sampling

    return sampling.nucleus_floor(probabilities, top_p)


def nucleus_floor_torch(probabilities: Tensor, top_p: Tensor) -> Tensor:
    # Invariant: the tokens at or above `low` sum to at least top_p, the tokens at or above `high` to less.
    low = torch.zeros_like(top_p, dtype=torch.int32)
    high = (probabilities.amax(dim=-1, keepdim=True)).view(torch.int32) + 1
    for _ in range(30):
        middle = low + (high - low) // 2
        reached = probabilities.where(probabilities >= middle.view(torch.float32), 0).sum(dim=-1, keepdim=True) >= top_p
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    return low.view(torch.float32)
