"""Decode attention: one program per item and KV head, whose queries share every key and value that it reads.

lengths ─► _plan: items of about equal size ─► _attend: the whole result of a row, or each item's part of it
                                                   └─► _merge: rows that have several items
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvist.kernels.gpu.launch import has_dependent_launch, wait_for_inputs
from kvist.kernels.operands import ITEM_MULTIPLE, MIN_ITEM_TOKENS, TARGET_ITEMS, DecodeItems

_MERGED_TILE = 64  # parts that a merging program reads at a time, over all its heads
_BLOCK, _WARPS, _STAGES = 64, 4, 3  # the fastest of nine for large batches; five such programs fit on a multiprocessor


@triton.jit
def _plan(
    lengths, firsts, item_rows, num_rows,
    ROWS: tl.constexpr, TARGET: tl.constexpr, MIN_TOKENS: tl.constexpr, MULTIPLE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    inside = row < num_rows
    wait_for_inputs(DEPENDENT)
    length = tl.load(lengths + row, mask=inside, other=0)
    wanted = tl.maximum(MIN_TOKENS, tl.cdiv(tl.sum(length, axis=0), TARGET))
    item_tokens = tl.cdiv(wanted, MULTIPLE) * MULTIPLE
    count = tl.cdiv(length, item_tokens)
    first = tl.cumsum(count, axis=0) - count
    tl.store(firsts + row, first, mask=inside)
    tl.store(firsts + num_rows, tl.sum(count, axis=0))
    tl.store(firsts + num_rows + 1, item_tokens)
    for part in range(tl.max(count, axis=0)):
        tl.store(item_rows + first + part, row, mask=part < count)


@triton.jit
def _attend(
    q, pages, table, lengths, firsts, item_rows, out, parts, part_weights, num_rows, scale,
    q_stride, out_stride, table_stride, page_stride, head_stride, kind_stride,
    PAGE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    item, kv_head, num_kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    wait_for_inputs(DEPENDENT)
    if item < tl.load(firsts + num_rows):
        row = tl.load(item_rows + item)
        item_tokens = tl.load(firsts + num_rows + 1)
        length = tl.load(lengths + row)
        start = (item - tl.load(firsts + row)) * item_tokens
        end = tl.minimum(length, start + item_tokens)
        head = tl.arange(0, HEADS)
        dim = tl.arange(0, DIMS)
        queried = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        place = (kv_head * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
        query = tl.load(q + row.to(tl.int64) * q_stride + place, mask=queried, other=0.0)
        row_table = table + row.to(tl.int64) * table_stride
        own_pages = pages + kv_head * head_stride
        best = tl.full((HEADS,), float("-inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        result = tl.zeros((HEADS, DIMS), tl.float32)
        for at in tl.range(start, end, BLOCK, num_stages=STAGES):
            token = at + tl.arange(0, BLOCK)
            present = token < end
            page = tl.load(row_table + token // PAGE, mask=present, other=0).to(tl.int64)
            start_of_token = own_pages + page * page_stride + (token % PAGE) * HEAD_DIM
            kept = present[:, None] & (dim < HEAD_DIM)[None, :]
            key = tl.load(start_of_token[:, None] + dim[None, :], mask=kept, other=0.0)
            value = tl.load(start_of_token[:, None] + kind_stride + dim[None, :], mask=kept, other=0.0)
            score = tl.dot(query, key.T) * scale  # in powers of 2
            score = tl.where(present[None, :], score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, axis=1))
            weight = tl.exp2(score - new_best[:, None])
            shrink = tl.exp2(best - new_best)
            total = total * shrink + tl.sum(weight, axis=1)
            result = tl.dot(weight.to(value.dtype), value, result * shrink[:, None])
            best = new_best
        result = result / total[:, None]
        if length <= item_tokens:
            tl.store(out + row.to(tl.int64) * out_stride + place, result.to(out.dtype.element_ty), mask=queried)
        else:
            part = item * num_kv_heads * GROUP
            tl.store(parts + part * HEAD_DIM + place, result, mask=queried)
            tl.store(part_weights + part + kv_head * GROUP + head, best + tl.log2(total), mask=head < GROUP)


@triton.jit
def _merge(
    lengths, firsts, out, parts, part_weights, num_rows, num_q_heads, out_stride,
    OWN: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    wait_for_inputs(DEPENDENT)
    length, item_tokens = tl.load(lengths + row), tl.load(firsts + num_rows + 1)
    if length > item_tokens:
        first, count = tl.load(firsts + row), tl.cdiv(length, item_tokens)
        own = tl.arange(0, HEADS)
        head = tl.program_id(1) * OWN + own
        dim = tl.arange(0, DIMS)
        best = tl.full((HEADS,), float("-inf"), tl.float32)
        total = tl.zeros((HEADS,), tl.float32)
        result = tl.zeros((HEADS, DIMS), tl.float32)
        for at in range(0, count, TILE):
            part = at + tl.arange(0, TILE)
            place = (first + part)[None, :] * num_q_heads + head[:, None]  # [HEADS, TILE]
            present = (part < count)[None, :] & (own < OWN)[:, None]
            weight = tl.load(part_weights + place, mask=present, other=float("-inf"))
            new_best = tl.maximum(best, tl.max(weight, axis=1))
            safe = tl.where(new_best == float("-inf"), 0.0, new_best)  # for padding heads
            share = tl.exp2(weight - safe[:, None])
            shrink = tl.exp2(best - safe)
            kept = present[:, :, None] & (dim < HEAD_DIM)[None, None, :]
            tile = tl.load(parts + place[:, :, None] * HEAD_DIM + dim[None, None, :], mask=kept, other=0.0)
            total = total * shrink + tl.sum(share, axis=1)
            result = result * shrink[:, None] + tl.sum(tile * share[:, :, None], axis=1)
            best = new_best
        place = head[:, None] * HEAD_DIM + dim[None, :]
        kept = (own < OWN)[:, None] & (dim < HEAD_DIM)[None, :]
        merged = (result / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + row.to(tl.int64) * out_stride + place, merged, mask=kept)


def plan_decodes(lengths: Tensor) -> DecodeItems:
    num_rows = lengths.shape[0]
    firsts = torch.empty(num_rows + 2, dtype=torch.int32, device=lengths.device)
    rows = torch.empty(num_rows + TARGET_ITEMS, dtype=torch.int32, device=lengths.device)
    dependent = has_dependent_launch(lengths.device)
    _plan[(1,)](
        lengths, firsts, rows, num_rows,
        triton.next_power_of_2(num_rows), TARGET_ITEMS, MIN_ITEM_TOKENS, ITEM_MULTIPLE, dependent,
        num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
    return DecodeItems(lengths=lengths, firsts=firsts, rows=rows)


def decode_attention(q: Tensor, pages: Tensor, table: Tensor, items: DecodeItems, out: Tensor) -> None:
    num_rows, max_items = items.lengths.shape[0], items.rows.shape[0]
    (num_q_heads, head_dim), num_kv_heads = q.shape[1:], pages.shape[1]
    group = num_q_heads // num_kv_heads
    assert q.stride(1) == out.stride(1) == head_dim, "a token's heads are contiguous"
    assert pages.stride(3) == head_dim, "a head's part of a page is contiguous"
    dims = triton.next_power_of_2(head_dim)
    parts = torch.empty((max_items, num_q_heads, head_dim), dtype=torch.float32, device=q.device)
    part_weights = torch.empty((max_items, num_q_heads), dtype=torch.float32, device=q.device)
    dependent = has_dependent_launch(q.device)
    log2_e = 1.4426950408889634
    _attend[(max_items, num_kv_heads)](
        q, pages, table, items.lengths, items.firsts, items.rows, out, parts, part_weights,
        num_rows, log2_e / head_dim**0.5,
        q.stride(0), out.stride(0), table.stride(0), pages.stride(0), pages.stride(1), pages.stride(2),
        pages.shape[3], group, max(16, triton.next_power_of_2(group)), head_dim, dims,
        _BLOCK, _STAGES, dependent,
        num_warps=_WARPS, launch_pdl=dependent,
    )  # fmt: skip
    # A batch of few rows may have many parts per row; a large batch has few parts per row.
    own = 1 if num_rows <= 32 else group
    heads = triton.next_power_of_2(own)
    _merge[(num_rows, num_q_heads // own)](
        items.lengths, items.firsts, out, parts, part_weights, num_rows, num_q_heads, out.stride(0),
        own, heads, max(1, _MERGED_TILE // heads), head_dim, dims, dependent,
        num_warps=4, launch_pdl=dependent,
    )  # fmt: skip
