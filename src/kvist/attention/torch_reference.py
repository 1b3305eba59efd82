"""Attention in plain PyTorch over the page-first layout: the reference, and the backend for CPUs.

`prepare` makes index tensors once per step; each layer then needs only a few operations:

- write: two `index_copy_` of the new tokens into their pages (K, then V);
- decode (one new token per request): one gather of the needed K and V pages, one fused attention over a group of
  requests. Requests are grouped by length, so that padding stays small;
- prefill chunk: one gather of prefix and chunk, then blocks of queries, each over no more keys than it may see.

Both gathers read the pool as a table of rows: a page's part of one head, one layer, K or V is one contiguous row of
page_size * head_dim elements, and another layer shifts every row number by the same amount. Therefore the index
tensors of layer 0 serve all layers, through views with a different start.

Grouped-query heads are never repeated: the query heads that share a KV head are queries of that head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.attention.backend import Attend, AttentionKind, Captures, GraphPlan, Span, reserve_nothing
from kvist.kernels.operands import Rotary
from kvist.kernels.rotary import rotated_heads

# Queries per block of a prefill chunk: limits the size of the mask and the number of masked keys that are read.
_QUERY_BLOCK = 256
# A shorter request may join a group if padding stays below this share of the group's pages. A separate group costs a
# few more operations per layer, about as much as copying `_PADDING_PAGES_FREE` pages.
_PADDING_SHARE = 0.25
_PADDING_PAGES_FREE = 8


class TorchAttention:
    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def bind(self, pool: Tensor) -> None:
        self._pool = _PoolRows(pool)

    def prepare(self, spans: Sequence[Span]) -> Attend:
        return _Step(self._pool, spans)

    def plan_decode_graph(self, max_batch: int, max_pages: int) -> GraphPlan | None:  # noqa: ARG002
        return None

    def plan_mixed_graph(self, max_batch: int, max_pages: int, max_tokens: int) -> GraphPlan | None:  # noqa: ARG002
        return None


TORCH = AttentionKind(
    build=TorchAttention,
    unfit=lambda _device, _dtype: None,
    captures=Captures.NOTHING,
    reserve_bytes=reserve_nothing,
)


class _PoolRows:
    """The pool as tables of rows, and scratch memory shared by all steps."""

    def __init__(self, pool: Tensor) -> None:
        num_pages, num_heads, num_layers, _, page_size, head_dim = pool.shape
        assert pool[0, 0].is_contiguous(), "a page's part of one head is contiguous"
        self.num_heads, self.page_size, self.head_dim = num_heads, page_size, head_dim
        self.dtype, self.device = pool.dtype, pool.device
        row_elements = page_size * head_dim
        # Row number of (page, head) at layer 0, K: page * page_stride + head * head_stride.
        self.page_stride, self.head_stride = pool.stride(0) // row_elements, pool.stride(1) // row_elements
        num_rows = (num_pages - 1) * self.page_stride + num_heads * self.head_stride
        rows = pool.as_strided((num_rows, row_elements), (row_elements, 1))
        self.page_rows = [rows[2 * layer :] for layer in range(num_layers)]
        slots = pool.as_strided((num_rows * page_size, head_dim), (head_dim, 1))
        self.key_slots = [slots[2 * layer * page_size :] for layer in range(num_layers)]
        self.value_slots = [slots[(2 * layer + 1) * page_size :] for layer in range(num_layers)]
        self._scratch = pool.new_empty(0)
        self._mask = pool.new_empty(0, 0)

    def scratch(self, num_rows: int) -> Tensor:
        """Return [num_rows, page_size * head_dim], overwritten by the next use. The memory is reused, because page
        faults of new memory would cost as much as the copy."""
        row_elements = self.page_size * self.head_dim
        if self._scratch.numel() < num_rows * row_elements:
            self._scratch = self._scratch.new_empty(num_rows * row_elements * 5 // 4)
        return self._scratch[: num_rows * row_elements].view(num_rows, row_elements)

    def causal_mask(self, num_queries: int, num_keys: int, group: int) -> Tensor:
        """Return [num_queries * group, num_keys], 0 or -inf: query num_queries - 1 - i sees all but the last i keys.

        The mask is the bottom right corner of one triangle that serves all blocks, layers and steps.
        """
        height, width = _QUERY_BLOCK * group, self._mask.shape[1]
        if self._mask.shape[0] != height or width < num_keys:
            width = max(num_keys, min(2 * width, num_keys + 4096), _QUERY_BLOCK)
            hidden = torch.ones(_QUERY_BLOCK, width, dtype=torch.bool, device=self.device)
            hidden = hidden.triu_(width - _QUERY_BLOCK + 1).repeat_interleave(group, dim=0)
            self._mask = torch.zeros(height, width, dtype=self.dtype, device=self.device)
            self._mask.masked_fill_(hidden, float("-inf"))
        mask = self._mask[height - num_queries * group :, width - num_keys :]
        return mask.clone() if mask.is_cuda else mask  # CUDA's kernels need aligned rows

    def indices(self, values: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values).reshape(-1)).to(self.device)

    def gather_rows(self, pages: npt.NDArray[np.int64]) -> Tensor:
        """Return the row numbers of `pages` [batch, num_pages] for layer 0, flat, ordered [2, batch, num_heads,
        num_pages]."""
        heads = np.arange(self.num_heads, dtype=np.int64) * self.head_stride
        keys = pages[:, None, :] * self.page_stride + heads[None, :, None]
        return self.indices(np.stack([keys, keys + 1]))


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Requests of similar length that each have one new token."""

    tokens: Tensor | None  # the rows of the requests in the batch; None: the first `batch` rows, in order
    batch: int
    rows: Tensor  # rows of the pool to gather
    padded_len: int  # keys per request in the gathered memory
    mask: Tensor | None  # [batch, 1, 1, padded_len]; None: one request, cut to its length instead
    num_keys: int  # of the longest request
    stale_slots: Tensor | None  # slots of the gathered memory after each request's last key, to be zeroed


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One request with several new tokens, batch rows [first, first + num_tokens)."""

    first: int
    num_tokens: int
    start: int
    rows: Tensor | None  # rows of the pool to gather; None: no prefix, so the new K/V suffice


class _Step:
    """One step's `Attend`."""

    def __init__(self, pool: _PoolRows, spans: Sequence[Span]) -> None:
        self._pool = pool
        num_decodes = next((i for i, span in enumerate(spans) if span.num_tokens != 1), len(spans))
        self._slots = _written_slots(pool, spans)
        self._groups = [
            _decode_group(pool, [spans[i] for i in members], None if len(members) == len(spans) else members)
            for members in _group_by_length(spans[:num_decodes], pool.page_size)
        ]
        self._chunks: list[_Chunk] = []
        first = num_decodes
        for span in spans[num_decodes:]:
            self._chunks.append(_chunk(pool, span, first))
            first += span.num_tokens

    def __call__(self, layer: int, heads: Tensor, rotary: Rotary | None) -> Tensor:
        pool = self._pool
        q, k, v = rotated_heads(heads, rotary, pool.num_heads)
        pool.key_slots[layer].index_copy_(0, self._slots, k.reshape(-1, pool.head_dim))
        pool.value_slots[layer].index_copy_(0, self._slots, v.reshape(-1, pool.head_dim))
        if len(self._groups) == 1 and self._groups[0].tokens is None:
            return self._decode(layer, self._groups[0], q).reshape(q.shape)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in self._groups:
            assert group.tokens is not None
            attended = self._decode(layer, group, q.index_select(0, group.tokens))
            out.index_copy_(0, group.tokens, attended.reshape(group.batch, *q.shape[1:]))
        for chunk in self._chunks:
            rows = slice(chunk.first, chunk.first + chunk.num_tokens)
            self._prefill(layer, chunk, q[rows], k[rows], v[rows], out[rows])
        return out

    def _decode(self, layer: int, group: _DecodeGroup, q: Tensor) -> Tensor:
        """q [batch, num_q_heads, head_dim] -> [batch, num_kv_heads, num_q_heads / num_kv_heads, head_dim]."""
        pool = self._pool
        gathered = pool.scratch(group.rows.numel())
        torch.index_select(pool.page_rows[layer], 0, group.rows, out=gathered)
        if group.stale_slots is not None:
            gathered.view(-1, pool.head_dim).index_fill_(0, group.stale_slots, 0.0)
        kv = gathered.view(2, group.batch, pool.num_heads, group.padded_len, pool.head_dim)
        if group.mask is None:
            kv = kv[:, :, :, : group.num_keys]
        keys, values = kv.unbind(0)
        grouped = q.view(group.batch, pool.num_heads, -1, pool.head_dim)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)

    def _prefill(self, layer: int, chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Fill `out` [num_tokens, num_q_heads, head_dim], one block of queries at a time."""
        pool = self._pool
        end = chunk.start + chunk.num_tokens
        if chunk.rows is None:
            keys, values = k.transpose(0, 1), v.transpose(0, 1)
        else:
            gathered = pool.scratch(chunk.rows.numel())
            torch.index_select(pool.page_rows[layer], 0, chunk.rows, out=gathered)
            keys, values = gathered.view(2, pool.num_heads, -1, pool.head_dim)[:, :, :end].unbind(0)
        group = q.shape[1] // pool.num_heads
        # The `group` query heads of token t become rows t * group, ... of their KV head.
        grouped = q.view(-1, pool.num_heads, group, pool.head_dim).transpose(0, 1)
        grouped_out = out.view(-1, pool.num_heads, group, pool.head_dim).transpose(0, 1)
        for low in range(0, chunk.num_tokens, _QUERY_BLOCK):
            high = min(low + _QUERY_BLOCK, chunk.num_tokens)
            visible = chunk.start + high  # keys [0, visible)
            attended = F.scaled_dot_product_attention(
                grouped[None, :, low:high].flatten(2, 3),
                keys[None, :, :visible],
                values[None, :, :visible],
                attn_mask=pool.causal_mask(high - low, visible, group),
            )
            grouped_out[:, low:high] = attended.view(pool.num_heads, high - low, group, pool.head_dim)


def _written_slots(pool: _PoolRows, spans: Sequence[Span]) -> Tensor:
    """Return the slot numbers of the new tokens for K of layer 0, flat in the order [num_tokens, num_heads]."""
    size = pool.page_size
    slots: list[npt.NDArray[np.int64]] = []
    for span in spans:
        first_page, last_page = span.start // size, (span.end - 1) // size
        pages = np.asarray(span.page_ids[first_page : last_page + 1], dtype=np.int64)
        assert len(pages) == last_page + 1 - first_page, "the scheduler plans pages for every new token"
        positions = np.arange(span.start, span.end, dtype=np.int64)
        slots.append(pages[positions // size - first_page] * (pool.page_stride * size) + positions % size)
    heads = np.arange(pool.num_heads, dtype=np.int64) * (pool.head_stride * size)
    return pool.indices(np.concatenate(slots)[:, None] + heads[None, :])


def _group_by_length(spans: Sequence[Span], page_size: int) -> list[list[int]]:
    """Group the indices of the spans, so that padding each group to its longest span wastes little."""
    num_pages = [-(-span.end // page_size) for span in spans]
    if not num_pages:
        return []
    longest, shortest = max(num_pages), min(num_pages)
    if (longest - shortest) * len(num_pages) <= _PADDING_PAGES_FREE:
        return [list(range(len(num_pages)))]  # in order: no row selection needed
    groups: list[list[int]] = []
    width = used = 0
    for index in sorted(range(len(num_pages)), key=lambda i: -num_pages[i]):
        need = num_pages[index]
        padding = width * (len(groups[-1]) + 1) - used - need if groups else 0
        if groups and padding <= max(_PADDING_PAGES_FREE, _PADDING_SHARE * (used + need)):
            groups[-1].append(index)
            used += need
        else:
            groups.append([index])
            width = used = need
    return [sorted(group) for group in groups]


def _decode_group(pool: _PoolRows, spans: Sequence[Span], tokens: Sequence[int] | None) -> _DecodeGroup:
    size = pool.page_size
    num_keys = np.array([span.end for span in spans], dtype=np.int64)
    num_pages = -(-num_keys // size)
    width = int(num_pages.max())
    pages = np.empty((len(spans), width), dtype=np.int64)
    for row, span, used in zip(pages, spans, num_pages.tolist(), strict=True):
        row[:used] = span.page_ids[:used]
        row[used:] = span.page_ids[0]  # padding: any valid page
    mask = stale = None
    if len(spans) > 1:
        hidden = np.arange(width * size)[None, :] >= num_keys[:, None]
        mask = torch.zeros(hidden.shape, dtype=pool.dtype, device=pool.device)
        mask.masked_fill_(torch.from_numpy(hidden).to(pool.device), float("-inf"))
        mask = mask[:, None, None, :]
        stale = _stale_slots(pool, num_keys, width * size)
    return _DecodeGroup(
        tokens=None if tokens is None else torch.tensor(tokens, dtype=torch.int64, device=pool.device),
        batch=len(spans),
        rows=pool.gather_rows(pages),
        padded_len=width * size,
        mask=mask,
        num_keys=int(num_keys.max()),
        stale_slots=stale,
    )


def _stale_slots(pool: _PoolRows, num_keys: npt.NDArray[np.int64], padded_len: int) -> Tensor | None:
    """Return the slots of the gathered memory after each request's last key, which must be zeroed.

    The mask alone is not enough, because old K/V may be NaN: -inf + NaN and 0 * NaN are NaN.
    """
    counts = padded_len - num_keys
    request = np.repeat(np.arange(len(num_keys)), counts)
    if not len(request):
        return None
    nth = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = request * (pool.num_heads * padded_len) + num_keys[request] + nth
    heads = np.arange(pool.num_heads) * padded_len
    kinds = np.arange(2) * (len(num_keys) * pool.num_heads * padded_len)
    return pool.indices(kinds[:, None, None] + heads[None, :, None] + first[None, None, :])


def _chunk(pool: _PoolRows, span: Span, first: int) -> _Chunk:
    rows = None
    if span.start > 0:
        pages = np.asarray(span.page_ids[: -(-span.end // pool.page_size)], dtype=np.int64)
        rows = pool.gather_rows(pages[None, :])
    return _Chunk(first=first, num_tokens=span.num_tokens, start=span.start, rows=rows)
