"""Attention of one new token per request over its pages, for any mixture of lengths.

Reading K and V is all the work, so every multiprocessor should read all the time. `plan_decodes` cuts the requests into
items of about equal numbers of tokens, on the device and once for all layers of a step: a short context stays whole, a
long one is read by many programs whose results are merged (as in FlashDecoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Only the device reads the lengths, so the same launches serve
every step, and a graph captures them once.

Measured on an H200: docs/performance.md, and the other tilings in docs/log.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvist.kernels.operands import ITEM_MULTIPLE, MIN_ITEM_TOKENS, TARGET_ITEMS, DecodeItems


def plan_decodes(lengths: Tensor) -> DecodeItems:
    """Cut a step into items. lengths [num_rows] int32: tokens of each row's context, including the new token; 0: the
    row is not a decode."""
    if not lengths.is_cuda:
        return plan_decodes_torch(lengths)
    from kvist.kernels.gpu import decode_attention as gpu

    return gpu.plan_decodes(lengths)


def plan_decodes_torch(lengths: Tensor) -> DecodeItems:
    wanted = max(MIN_ITEM_TOKENS, -(-int(lengths.sum()) // TARGET_ITEMS))
    item_tokens = -(-wanted // ITEM_MULTIPLE) * ITEM_MULTIPLE
    counts = (lengths + item_tokens - 1) // item_tokens
    firsts = torch.cat((counts.new_zeros(1), counts.cumsum(0), counts.new_tensor([item_tokens])))
    rows = counts.new_zeros(lengths.shape[0] + TARGET_ITEMS)
    found = torch.repeat_interleave(torch.arange(lengths.shape[0]), counts)
    rows[: found.shape[0]] = found
    return DecodeItems(lengths=lengths, firsts=firsts.int(), rows=rows.int())


def decode_attention(q: Tensor, pages: Tensor, table: Tensor, items: DecodeItems, out: Tensor) -> None:
    """Write out[row] for every row with a length above 0; the other rows are not changed.

    q, out [at least num_rows, num_q_heads, head_dim]; pages [num_pages, num_kv_heads, 2, page_size, head_dim]: one
    layer's view of the pool; table [num_rows, max_pages] int32: the pages of each row.
    """
    if not q.is_cuda:
        decode_attention_torch(q, pages, table, items, out)
        return
    from kvist.kernels.gpu import decode_attention as gpu

    gpu.decode_attention(q, pages, table, items, out)


def decode_attention_torch(q: Tensor, pages: Tensor, table: Tensor, items: DecodeItems, out: Tensor) -> None:
    num_kv_heads, page_size, head_dim = pages.shape[1], pages.shape[3], pages.shape[4]
    for row, length in enumerate(items.lengths.tolist()):
        if not length:
            continue
        history = pages[table[row, : -(-length // page_size)].long()]  # [pages, kv_heads, 2, page_size, head_dim]
        keys, values = history.permute(2, 1, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :length].float()
        grouped = q[row].float().view(num_kv_heads, -1, head_dim)
        weights = torch.softmax(grouped @ keys.transpose(1, 2) / head_dim**0.5, dim=-1)
        out[row] = (weights @ values).view(-1, head_dim).to(out.dtype)
