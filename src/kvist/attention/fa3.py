"""FlashAttention-3 over the page-first pool, for Hopper GPUs, in bf16 or fp16. Package: tokenspeed-fa3.

A layer's K and V are strided views of the pool, [num_pages, page_size, num_kv_heads, head_dim]: nothing is gathered or
copied. One kernel rotates new tokens and writes them to their pages (kernels/rotary.py). Then one varlen call of the
library attends for all prompt chunks, and our own kernel (kernels/decode_attention.py) for all decodes, which come
first: in one call the library cannot split the contexts of some requests only, and it reads short contexts slowly.
The index tensors of both are computed once per step for all layers, on the device.

The runner chooses tokens, pages and batches, and makes and replays captured graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from kvist.attention.backend import Attend, AttentionKind, Captures, GraphPlan, Span, SpanColumns, reserve_nothing
from kvist.attention.page_tables import PageTables
from kvist.attention.pinned import PinnedRing
from kvist.errors import ConfigError
from kvist.kernels.decode_attention import decode_attention, plan_decodes
from kvist.kernels.operands import DecodeItems, Rotary
from kvist.kernels.rotary import rotate_and_write

REMEDY = "pip install tokenspeed-fa3 (Hopper GPUs, CUDA 12.8 or newer)"


_DTYPES = (torch.bfloat16, torch.float16)


def unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the backend cannot run on this device with this dtype; None if it can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return f"needs a Hopper GPU, and the device is {device}"
    if dtype not in _DTYPES:
        return f"needs bfloat16 or float16, and the dtype is {dtype}"
    if find_spec("flash_attn_interface") is None:
        return f"is not installed ({REMEDY})"
    return None


class Fa3Attention:
    name = "fa3"

    def __init__(self, device: torch.device) -> None:
        try:
            import flash_attn_interface
        except ImportError as error:
            raise ConfigError(
                f"--attention-backend fa3: {error}. Install it with {REMEDY}, or use auto", param="attention_backend"
            ) from error
        self._library = flash_attn_interface
        self._device = device

    def bind(self, pool: Tensor) -> None:
        self._pool = _Pool(self._library, pool)
        self._tables = PageTables(self._device, pool.shape[4])
        self._ring = PinnedRing(self._device)

    def prepare(self, spans: Sequence[Span]) -> Attend:
        columns = SpanColumns.of(spans)
        num_decodes = _count_decodes(columns)
        index = _Index.allocate(len(columns), columns.num_tokens, self._device)
        index.fill(columns, self._tables, self._ring)
        table = index.table_rows.new_zeros(len(columns), -(-int(columns.ends.max()) // self._pool.page_size))
        longest_chunk = int(columns.counts[num_decodes:].max(initial=0))
        return _Step(self._pool, index, self._tables, table, num_decodes=num_decodes, longest_chunk=longest_chunk)

    def plan_decode_graph(self, max_batch: int, max_pages: int) -> GraphPlan:
        return self.plan_mixed_graph(max_batch, max_pages, 0)

    def plan_mixed_graph(self, max_batch: int, max_pages: int, max_tokens: int) -> GraphPlan:
        self._tables.reserve(max_batch, max_pages)
        index = _Index.allocate(max_batch, max(max_batch, max_tokens), self._device)
        table = index.table_rows.new_zeros(max_batch, max_pages)
        return _GraphPlan(self._pool, self._tables, self._ring, index, table, has_chunks=max_tokens > 0)


FA3 = AttentionKind(build=Fa3Attention, unfit=unfit, captures=Captures.ALL, reserve_bytes=reserve_nothing)


def _count_decodes(columns: SpanColumns) -> int:
    """Count the decodes, all of which come before the first chunk."""
    if columns.num_tokens == len(columns):
        return len(columns)
    return int(np.flatnonzero(columns.counts != 1)[0])


class _Pool:
    """The library, and views of the pool for each layer."""

    def __init__(self, library: object, pool: Tensor) -> None:
        self.library = library
        self.page_size, self.num_kv_heads = int(pool.shape[4]), int(pool.shape[1])
        self.dtype = pool.dtype
        self.layers = [pool[:, :, layer] for layer in range(pool.shape[2])]
        self.keys = [layer[:, :, 0].transpose(1, 2) for layer in self.layers]
        self.values = [layer[:, :, 1].transpose(1, 2) for layer in self.layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """The index tensors of a step, int32 on the device, filled by one copy. A span is a decode or a chunk; the call for
    the other kind sees the span with length 0."""

    packed: Tensor  # all tensors below, in one allocation
    ends: Tensor  # [max_spans] keys of each span, its new tokens included
    decode_lengths: Tensor  # [max_spans] `ends` of decodes, 0 for chunks
    chunk_lengths: Tensor  # [max_spans] `ends` of chunks, 0 for decodes
    table_rows: Tensor  # [max_spans] rows in the page tables
    cumulative: Tensor  # [max_spans + 1]: the first row of each chunk; for a decode, the first row of the first chunk
    slots: Tensor  # [max_rows] the slot of each row's K and V; negative: not written

    @classmethod
    def allocate(cls, max_spans: int, max_rows: int, device: torch.device) -> _Index:
        packed = torch.zeros(5 * max_spans + 1 + max_rows, dtype=torch.int32, device=device)
        sizes = [max_spans, max_spans, max_spans, max_spans, max_spans + 1, max_rows]
        ends, decode_lengths, chunk_lengths, table_rows, cumulative, slots = torch.split(packed, sizes)
        return cls(
            packed=packed,
            ends=ends,
            decode_lengths=decode_lengths,
            chunk_lengths=chunk_lengths,
            table_rows=table_rows,
            cumulative=cumulative,
            slots=slots,
        )

    def fill(self, columns: SpanColumns, tables: PageTables, ring: PinnedRing) -> None:
        count, num_decodes, size = len(columns), _count_decodes(columns), self.table_rows.shape[0]
        assert count <= size, "a graph is captured for the largest batch it replays"
        packed = ring.next_buffer(self.packed.shape[0])
        rows, cumulative = packed[: 4 * size].reshape(4, size), packed[4 * size : 5 * size + 1]
        slots = packed[5 * size + 1 :]
        rows[:] = 0
        rows[0, :count] = columns.ends
        rows[1, :num_decodes] = columns.ends[:num_decodes]
        rows[2, num_decodes:count] = columns.ends[num_decodes:]
        rows[3, :count] = table_rows = tables.assign_rows(columns)
        cumulative[:] = num_decodes
        if num_decodes < count:
            cumulative[num_decodes + 1 : count + 1] += columns.counts[num_decodes:].cumsum(dtype=np.int32)
            cumulative[count + 1 :] = cumulative[count]
        written = tables.slots(columns, table_rows)
        slots[: len(written)] = written
        slots[len(written) :] = -1
        ring.send(self.packed)


class _Step:
    """One step's `Attend`."""

    def __init__(
        self, pool: _Pool, index: _Index, tables: PageTables, table: Tensor, *, num_decodes: int, longest_chunk: int
    ) -> None:
        """`table` [max_spans, max_pages] int32 receives the pages of each span. `num_decodes`: upper bound of the
        decodes, which are the first rows. `longest_chunk`: in tokens; 0: no chunk."""
        tables.read(index.table_rows, index.ends, table)
        self._pool = pool
        self._index = index
        self._table = table
        self._num_decodes = num_decodes
        self._longest_chunk = longest_chunk
        self._items: DecodeItems | None = None  # made by the first layer
        self._metadata: Tensor | None = None  # the library's schedule for the chunks, made by the first layer

    def __call__(self, layer: int, heads: Tensor, rotary: Rotary | None) -> Tensor:
        q = rotate_and_write(heads, rotary, self._pool.layers[layer], self._index.slots[: heads.shape[0]])
        out = self._attend_chunks(layer, q) if self._longest_chunk else torch.empty_like(q)
        if self._num_decodes:
            if self._items is None:
                self._items = plan_decodes(self._index.decode_lengths[: self._num_decodes])
            decode_attention(q, self._pool.layers[layer], self._table, self._items, out)
        return out

    def _attend_chunks(self, layer: int, q: Tensor) -> Tensor:
        """Attend for the chunks; rows outside the chunks are undefined."""
        pool, index = self._pool, self._index
        if self._metadata is None:
            self._metadata = pool.library.get_scheduler_metadata(  # type: ignore[attr-defined]
                index.table_rows.shape[0],
                self._longest_chunk,
                self._table.shape[1] * pool.page_size,
                q.shape[1],
                pool.num_kv_heads,
                q.shape[2],
                index.chunk_lengths,
                cu_seqlens_q=index.cumulative,
                qkv_dtype=pool.dtype,
                page_size=pool.page_size,
                causal=True,
                num_splits=1,
            )
        out: Tensor = pool.library.flash_attn_with_kvcache(  # type: ignore[attr-defined]
            q,
            pool.keys[layer],
            pool.values[layer],
            cache_seqlens=index.chunk_lengths,
            page_table=self._table,
            cu_seqlens_q=index.cumulative,
            max_seqlen_q=self._longest_chunk,
            causal=True,
            scheduler_metadata=self._metadata,
            num_splits=1,
        )
        return out


class _GraphPlan:
    """`GraphPlan`: an index at a fixed address; a captured kernel reads the page tables. Every graph is captured for
    the largest number of spans; unused spans are empty and cost almost nothing."""

    def __init__(
        self, pool: _Pool, tables: PageTables, ring: PinnedRing, index: _Index, table: Tensor, *, has_chunks: bool
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._ring = ring
        self._index = index
        self._table = table
        self._has_chunks = has_chunks

    def fill(self, spans: Sequence[Span]) -> None:
        self._index.fill(SpanColumns.of(spans), self._tables, self._ring)

    def attend(self, num_rows: int) -> Attend:
        return _Step(
            self._pool,
            self._index,
            self._tables,
            self._table,
            num_decodes=min(num_rows, self._table.shape[0]),
            longest_chunk=num_rows if self._has_chunks else 0,
        )
