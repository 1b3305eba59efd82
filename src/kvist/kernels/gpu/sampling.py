"""Sampling in three small kernels over blocks of the vocabulary: the row's maximum, the noisy argmax of each block
against that maximum, and the best block. The hash equals the hash in kernels/sampling.py, bit for bit. The maximum of a
block with NaN is NaN, so the last kernel finds invalid rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs

_BLOCK = 2048
_NOISE_SPAN = 25.5  # the noise is in [-2.9, 22.2]


@triton.jit
def _noise(low, high, token):
    """Gumbel noise of uint32 token ids; kernels/sampling.py explains it."""
    hashed = (token * 0x9E3779B1) ^ low
    hashed = (hashed ^ (hashed >> 16)) * 0x85EBCA6B
    hashed = ((hashed ^ (hashed >> 13)) + high) * 0xC2B2AE35
    hashed = (hashed ^ (hashed >> 16)) * 0x27D4EB2F
    hashed = (hashed ^ (hashed >> 15)) & 0x7FFFFFFF
    value = (hashed.to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    value = tl.minimum(value, 0.9999999403953552)  # 1 - 2^-24
    # log1p(-v) exactly, as log(w) * -v / (w - 1) with w = 1 - v after rounding
    rest = 1.0 - value
    log1p = tl.where(rest == 1.0, -value, tl.log(rest) * (-value / tl.where(rest == 1.0, 1.0, rest - 1.0)))
    return -tl.log(-log1p)


@triton.jit
def _block_maxima(logits, row_stride, vocab_size, maxima, num_blocks, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(DEPENDENT)
    values = tl.load(logits + row * row_stride + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    num_broken = tl.sum((values != values).to(tl.int32), axis=0)
    tl.store(maxima + row * num_blocks + block, tl.where(num_broken > 0, float("nan"), tl.max(values, axis=0)))


# Batches place these two at any offset of one buffer: a version for each alignment would be compiled while serving.
@triton.jit(do_not_specialize_on_alignment=["temperatures", "keys"])
def _block_best(
    logits, row_stride, vocab_size, temperatures, keys, maxima, best, best_token, num_blocks,
    SPAN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    nth = tl.arange(0, BLOCKS)
    wait_for_inputs(DEPENDENT)
    highest = tl.max(tl.load(maxima + row * num_blocks + nth, mask=nth < num_blocks, other=float("-inf")), axis=0)
    reach = tl.load(maxima + row * num_blocks + block) - highest
    temperature = tl.load(temperatures + row)
    place = row * num_blocks + block
    if reach >= -SPAN * temperature:  # else no noise can lift a token of this block above the row's likeliest token
        values = tl.load(logits + row * row_stride + tokens, mask=inside, other=float("-inf")).to(tl.float32) - highest
        if temperature > 0.0:
            low = tl.load(keys + row * 2).to(tl.uint32, bitcast=True)
            high = tl.load(keys + row * 2 + 1).to(tl.uint32, bitcast=True)
            values = values / temperature + _noise(low, high, tokens.to(tl.uint32))
            values = tl.where(inside, values, float("-inf"))
        tl.store(best + place, tl.max(values, axis=0))
        tl.store(best_token + place, block * BLOCK + tl.argmax(values, axis=0))
    else:
        tl.store(best + place, float("-inf"))
        tl.store(best_token + place, block * BLOCK)


@triton.jit
def _row_best(maxima, best, best_token, chosen, num_blocks, BLOCKS: tl.constexpr, DEPENDENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    nth = tl.arange(0, BLOCKS)
    wait_for_inputs(DEPENDENT)
    values = tl.load(best + row * num_blocks + nth, mask=nth < num_blocks, other=float("-inf"))
    winner = tl.argmax(values, axis=0)
    token = tl.load(best_token + row * num_blocks + winner).to(tl.int64)
    peaks = tl.load(maxima + row * num_blocks + nth, mask=nth < num_blocks, other=float("-inf"))
    num_broken = tl.sum(((peaks != peaks) | (peaks == float("inf"))).to(tl.int32), axis=0)
    num_possible = tl.sum((peaks > float("-inf")).to(tl.int32), axis=0)
    tl.store(chosen + row, tl.where((num_broken == 0) & (num_possible > 0), token, -1))


def choose_tokens(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, "a row of logits is contiguous"
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    blocks = triton.next_power_of_2(num_blocks)
    dependent = has_dependent_launch(logits.device)
    chosen = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return chosen
    maxima = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
    best, best_token = torch.empty_like(maxima), torch.empty_like(maxima, dtype=torch.int32)
    grid = (num_rows, num_blocks)
    _block_maxima[grid](
        logits, logits.stride(0), vocab_size, maxima, num_blocks, _BLOCK, dependent, launch_pdl=dependent
    )
    _block_best[grid](
        logits, logits.stride(0), vocab_size, temperatures, keys, maxima, best, best_token, num_blocks,
        _NOISE_SPAN, blocks, _BLOCK, dependent, launch_pdl=dependent,
    )  # fmt: skip
    _row_best[(num_rows,)](
        maxima, best, best_token, chosen, num_blocks, blocks, dependent, num_warps=1, launch_pdl=dependent
    )
    return chosen


@triton.jit
def _sum_above(probabilities, vocab_size, first, second, third, BLOCK: tl.constexpr):
    """Sum the probabilities at or above each of three thresholds."""
    sum_1 = tl.zeros((BLOCK,), tl.float32)
    sum_2, sum_3 = sum_1, sum_1
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        values = tl.load(probabilities + tokens, mask=tokens < vocab_size, other=0.0)
        sum_1 += tl.where(values >= first, values, 0.0)
        sum_2 += tl.where(values >= second, values, 0.0)
        sum_3 += tl.where(values >= third, values, 0.0)
    return tl.sum(sum_1, axis=0), tl.sum(sum_2, axis=0), tl.sum(sum_3, axis=0)


@triton.jit
def _nucleus_floor(probabilities, vocab_size, top_p, floors, BLOCK: tl.constexpr):
    """One program per row. Each pass over the row finds two of the 30 bits of the floor."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(top_p + row)
    low = wanted.to(tl.int32, bitcast=True) * 0
    high = low + 0x3F800001  # just above 1
    while high - low > 1:
        half = low + (high - low) // 2
        quarter = low + (high - low) // 4
        three = half + (high - low) // 4
        sum_1, sum_2, sum_3 = _sum_above(
            probabilities + row * vocab_size,
            vocab_size,
            quarter.to(tl.float32, bitcast=True),
            half.to(tl.float32, bitcast=True),
            three.to(tl.float32, bitcast=True),
            BLOCK,
        )
        below = tl.where(sum_1 >= wanted, quarter, low)
        above = tl.where(sum_1 >= wanted, half, quarter)
        above = tl.where(sum_2 >= wanted, tl.where(sum_3 >= wanted, high, three), above)
        low = tl.where(sum_2 >= wanted, tl.where(sum_3 >= wanted, three, half), below)
        high = above
    tl.store(floors + row, low.to(tl.float32, bitcast=True))


def nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    assert probabilities.is_contiguous()
    num_rows, vocab_size = probabilities.shape
    floors = torch.empty((num_rows, 1), dtype=torch.float32, device=probabilities.device)
    _nucleus_floor[(num_rows,)](probabilities, vocab_size, top_p, floors, 4096, num_warps=16)
    return floors
