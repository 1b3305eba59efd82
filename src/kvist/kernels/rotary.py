"""Rotary position embedding over half-split heads (dimension i pairs with i + head_dim / 2), and the write of K and V
into their pages in the same kernel: every head is read once and written once.

A model prepares `Rotary`; an attention backend that knows the pages calls `rotate_and_write`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.kernels.operands import Rotary


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """positions [T] int64, frequencies [head_dim / 2] fp32 -> (cos, signed sin), each [T, 1, head_dim], fp32; the
    first half of the sines is negated."""
    if not positions.is_cuda:
        return rotation_torch(positions, frequencies)
    from kvist.kernels.gpu import rotary

    return rotary.rotation(positions, frequencies)


def rotation_torch(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.unsqueeze(1).float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """heads [T, num_heads, head_dim] -> the same, rotated; computed in fp32 for every dtype."""
    partners = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cos, partners, sin).to(heads.dtype)


def norm_and_rotate(qk: Tensor, rotary: Rotary) -> Tensor:
    """qk [T, num_q_heads + num_kv_heads, head_dim] -> the same, rotated; normed first if `rotary` has a weight."""
    if rotary.qk_weight is not None:
        qk = F.rms_norm(qk, qk.shape[-1:], None, rotary.eps) * rotary.qk_weight
    return rotate(qk, rotary.cos, rotary.sin)


def rotated_heads(heads: Tensor, rotary: Rotary | None, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """heads [T, num_q_heads + 2 * num_kv_heads, head_dim] -> q, k, v, with q and k rotated; `rotary` None: without a
    rotation."""
    num_rotated = heads.shape[1] - num_kv_heads
    qk, v = heads[:, :num_rotated], heads[:, num_rotated:]
    if rotary is not None:
        qk = norm_and_rotate(qk, rotary)
    return qk[:, : num_rotated - num_kv_heads], qk[:, num_rotated - num_kv_heads :], v


def rotate_and_write(heads: Tensor, rotary: Rotary | None, pages: Tensor, slots: Tensor) -> Tensor:
    """Rotate q and k, write k and v into the pages of one layer, and return q [T, num_q_heads, head_dim].

    heads [T, num_q_heads + 2 * num_kv_heads, head_dim]: q, k, v of each token. pages [num_pages, num_kv_heads, 2,
    page_size, head_dim]: one layer's view of the pool. slots [T] int32: page * page_size + offset of each token;
    negative: a padding row, whose K and V are not written. `rotary` None: q and k are already rotated.
    """
    if not heads.is_cuda:
        return rotate_and_write_torch(heads, rotary, pages, slots)
    from kvist.kernels.gpu import rotary as gpu

    return gpu.rotate_and_write(heads, rotary, pages, slots)


def rotate_and_write_torch(heads: Tensor, rotary: Rotary | None, pages: Tensor, slots: Tensor) -> Tensor:
    num_kv_heads, page_size = pages.shape[1], pages.shape[3]
    q, k, v = rotated_heads(heads, rotary, num_kv_heads)
    kept = slots >= 0
    page_ids, offsets = (slots[kept] // page_size).long(), (slots[kept] % page_size).long()
    pages[page_ids, :, 0, offsets] = k[kept]
    pages[page_ids, :, 1, offsets] = v[kept]
    return q
