"""Rotates q and k, norms their heads, and writes K and V into the pages, in one pass over the fused projection's
output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs
from kvist.kernels.operands import Rotary

_HEADS_PER_PROGRAM = 4


@triton.jit
def _rotation(positions, frequencies, cos, sin, half, HALF: tl.constexpr, DEPENDENT: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HALF)
    inside = dims < half
    frequency = tl.load(frequencies + dims, mask=inside, other=0.0)
    wait_for_inputs(DEPENDENT)
    angle = tl.load(positions + token).to(tl.float32) * frequency
    cosine, sine = tl.cos(angle), tl.sin(angle)
    row = token * 2 * half
    tl.store(cos + row + dims, cosine, mask=inside)
    tl.store(cos + row + half + dims, cosine, mask=inside)
    tl.store(sin + row + dims, -sine, mask=inside)
    tl.store(sin + row + half + dims, sine, mask=inside)


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, half = positions.shape[0], frequencies.shape[0]
    cos = torch.empty((num_tokens, 1, 2 * half), dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    dependent = has_dependent_launch(positions.device)
    if num_tokens:
        _rotation[(num_tokens,)](
            positions, frequencies, cos, sin, half, triton.next_power_of_2(half), dependent,
            num_warps=1, launch_pdl=dependent,
        )  # fmt: skip
    return cos, sin


@triton.jit
def _rotate_and_write(
    heads, cos, sin, qk_weight, eps, q_out, pages, slots,
    token_stride, page_stride, head_stride, kind_stride, page_size,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, HEADS: tl.constexpr,
    ROTATE: tl.constexpr, NORM: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    inside = (dim < HEAD_DIM) & (head < NUM_Q + 2 * NUM_KV)
    rotated = head < NUM_Q + NUM_KV  # v is neither normed nor rotated
    partner = tl.where(dim < HEAD_DIM // 2, dim + HEAD_DIM // 2, dim - HEAD_DIM // 2)
    wait_for_inputs(DEPENDENT)
    row = heads + token * token_stride + head * HEAD_DIM
    value = tl.load(row + dim, mask=inside, other=0.0)
    if ROTATE:
        own, other = value.to(tl.float32), tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            scale = 1.0 / tl.sqrt(tl.sum(own * own, axis=1)[:, None] / HEAD_DIM + eps)
            weight = qk_weight + head * HEAD_DIM
            own *= scale * tl.load(weight + dim, mask=inside & rotated, other=0.0).to(tl.float32)
            other *= scale * tl.load(weight + partner, mask=inside & rotated, other=0.0).to(tl.float32)
        cosine = tl.load(cos + token * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
        sine = tl.load(sin + token * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
        value = tl.where(rotated, (own * cosine + other * sine).to(value.dtype), value)
    tl.store(q_out + (token * NUM_Q + head) * HEAD_DIM + dim, value, mask=inside & (head < NUM_Q))
    slot = tl.load(slots + token)
    page, offset = (slot // page_size).to(tl.int64), slot % page_size
    kv_head = (head - NUM_Q) % NUM_KV
    kind = (head - NUM_Q) // NUM_KV  # 0: k, 1: v
    place = pages + page * page_stride + kv_head * head_stride + kind * kind_stride + offset * HEAD_DIM
    tl.store(place + dim, value, mask=inside & (head >= NUM_Q) & (slot >= 0))


def rotate_and_write(heads: Tensor, rotary: Rotary | None, pages: Tensor, slots: Tensor) -> Tensor:
    num_tokens, num_heads, head_dim = heads.shape
    num_kv = pages.shape[1]
    num_q = num_heads - 2 * num_kv
    assert heads.stride(2) == 1, "a head is contiguous"
    assert heads.stride(1) == head_dim, "a token's heads are contiguous"
    assert pages.stride(3) == head_dim, "a head's part of a page is contiguous"
    q_out = torch.empty((num_tokens, num_q, head_dim), dtype=heads.dtype, device=heads.device)
    weight = None if rotary is None else rotary.qk_weight
    dependent = has_dependent_launch(heads.device)
    if num_tokens:
        _rotate_and_write[(num_tokens, triton.cdiv(num_heads, _HEADS_PER_PROGRAM))](
            heads, None if rotary is None else rotary.cos, None if rotary is None else rotary.sin, weight,
            0.0 if rotary is None else rotary.eps, q_out, pages, slots,
            heads.stride(0), pages.stride(0), pages.stride(1), pages.stride(2), pages.shape[3],
            num_q, num_kv, head_dim, triton.next_power_of_2(head_dim), _HEADS_PER_PROGRAM,
            rotary is not None, weight is not None, dependent,
            num_warps=2, launch_pdl=dependent,
        )  # fmt: skip
    return q_out
