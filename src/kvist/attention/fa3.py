"""FlashAttention-3 over the page-first pool, for Hopper GPUs, in bf16 or fp16. Package: tokenspeed-fa3.

A layer's K and V are strided views of the pool, [num_pages, page_size, num_kv_heads, head_dim]: nothing is gathered or
copied. New tokens are rotated and written to their pages by one kernel (kernels/rotary.py), then one call attends for
the whole batch. Decodes of long contexts are split over the multiprocessors: the library plans the split from the
lengths on the device, once for all layers of a step. It cannot split some requests of a call and not others, so beside
prefill chunks a few decodes of long contexts are a call of their own. Measured on an H200, microseconds a layer of a
Qwen2-7B, one call unsplit / two calls: 77 / 80 for 128 decodes of 600 tokens beside a chunk of 1024, 86 / 89 for 32 of
1000 beside 2048, 91 / 100 for 200 of 600 beside 256. One decode of 16,384 takes 205 unsplit and 19 split.

It does not choose tokens, pages or batches; a captured graph is made and replayed by the runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kvist.attention.backend import Attend, GraphPlan, Span, SpanColumns
from kvist.attention.page_tables import PageTables, upload
from kvist.attention.pinned import PinnedRing
from kvist.errors import ConfigError
from kvist.kernels.rotary import Rotary, rotate_and_write

_FEW_DECODES, _LONG_TOKENS = 32, 2048  # fewer decodes than this leave multiprocessors idle; shorter ones end soon
REMEDY = "pip install tokenspeed-fa3 (Hopper GPUs, CUDA 12.8 or newer)"


class Fa3Attention:
    name = "fa3"

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
            raise ConfigError(
                f"--attention-backend fa3 needs a Hopper GPU, and this is {device}: use auto", param="attention_backend"
            )
        try:
            import flash_attn_interface
        except ImportError as error:
            raise ConfigError(
                f"--attention-backend fa3: {error}. Install it with {REMEDY}, or use auto", param="attention_backend"
            ) from error
        self._library = flash_attn_interface
        self._device = device

    def bind(self, pool: Tensor) -> None:
        if pool.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"--attention-backend fa3 takes bfloat16 and float16, not {pool.dtype}: use --dtype bfloat16, or torch",
                param="attention_backend",
            )
        self._pool = _Pool(self._library, pool)
        self._tables = PageTables(self._device, pool.shape[4])

    def prepare(self, spans: Sequence[Span]) -> Attend:
        columns = SpanColumns.of(spans)
        rows = self._tables.seat(columns)
        written = self._tables.slots(columns, rows)
        ends = columns.ends.tolist()
        cut = self._cut(spans)
        starts = np.array([0, *accumulate(span.num_tokens for span in spans[cut:])], dtype=np.int32)
        packed = np.concatenate((columns.ends, rows, starts, written))
        sizes = [len(spans), len(spans), len(starts), len(written)]
        lengths, seats, cumulative, slots = torch.split(upload(packed, self._device), sizes)
        parts = []
        for low, high in ((0, cut), (cut, len(spans))):
            if low < high:
                part = _Part(
                    first=low,
                    lengths=lengths[low:high],
                    table=self._read_table(seats[low:high], lengths[low:high], max(ends[low:high])),
                    cumulative=None if high == cut else cumulative,
                    longest=max(span.num_tokens for span in spans[low:high]),
                    is_mixed=high > cut and spans[low].num_tokens == 1,
                )
                parts.append(part)
        return _Step(self._pool, slots, parts)

    def _read_table(self, seats: Tensor, lengths: Tensor, longest: int) -> Tensor:
        table = seats.new_zeros(len(seats), -(-longest // self._pool.page_size))
        self._tables.read(seats, lengths, table, torch.empty_like(seats))
        return table

    def _cut(self, spans: Sequence[Span]) -> int:
        """Spans before it are decodes that get a call of their own; those behind it share one."""
        num_decodes = next((i for i, span in enumerate(spans) if span.num_tokens != 1), len(spans))
        if num_decodes == len(spans):
            return num_decodes
        longest = max((span.end for span in spans[:num_decodes]), default=0)
        return num_decodes if num_decodes < _FEW_DECODES and longest > _LONG_TOKENS else 0

    def plan_graph(self, max_batch: int, max_pages: int) -> GraphPlan:
        self._tables.reserve(max_batch, max_pages)
        return _Fa3Plan(self._pool, self._tables, max_batch, max_pages, self._device)


class _Pool:
    """The library, and its views of each layer."""

    def __init__(self, library: object, pool: Tensor) -> None:
        self.library = library
        self.page_size, self.num_kv_heads = int(pool.shape[4]), int(pool.shape[1])
        self.dtype = pool.dtype
        self.layers = [pool[:, :, layer] for layer in range(pool.shape[2])]
        self.keys = [layer[:, :, 0].transpose(1, 2) for layer in self.layers]
        self.values = [layer[:, :, 1].transpose(1, 2) for layer in self.layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Spans that one call attends for."""

    first: int  # its first row of the batch
    lengths: Tensor  # [batch] int32: keys of each request, its new tokens included
    table: Tensor  # [batch, num_pages] int32
    cumulative: Tensor | None  # [batch + 1] int32: the first row of each span, counted from `first`; None: decodes
    longest: int  # new tokens
    is_mixed: bool  # decodes and chunks


class _Step:
    """One step's `RotatingAttend`."""

    def __init__(self, pool: _Pool, slots: Tensor, parts: Sequence[_Part]) -> None:
        self._pool = pool
        self._slots = slots
        self._parts = parts
        self._metadata: list[Tensor | None] | None = None  # how the library splits each part; made by the first layer

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = rotate_and_write(torch.cat((q, k, v), dim=1), None, self._pool.layers[layer], self._slots)
        return self._attend(layer, q)

    def rotated(self, layer: int, heads: Tensor, rotary: Rotary) -> Tensor:
        return self._attend(layer, rotate_and_write(heads, rotary, self._pool.layers[layer], self._slots))

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        if self._metadata is None:
            self._metadata = [self._plan(part, q) for part in self._parts]
        if len(self._parts) == 1:
            return self._call(layer, q, self._parts[0], self._metadata[0])
        out = torch.empty_like(q)
        ends = [part.first for part in self._parts[1:]] + [q.shape[0]]
        for part, end, metadata in zip(self._parts, ends, self._metadata, strict=True):
            out[part.first : end] = self._call(layer, q[part.first : end], part, metadata)
        return out

    def _plan(self, part: _Part, q: Tensor) -> Tensor | None:
        if part.cumulative is not None:
            return None
        pool = self._pool
        metadata: Tensor = pool.library.get_scheduler_metadata(  # type: ignore[attr-defined]
            part.lengths.shape[0],
            1,
            part.table.shape[1] * pool.page_size,
            q.shape[1],
            pool.num_kv_heads,
            q.shape[2],
            part.lengths,
            qkv_dtype=pool.dtype,
            page_size=pool.page_size,
            causal=True,
        )
        return metadata

    def _call(self, layer: int, q: Tensor, part: _Part, metadata: Tensor | None) -> Tensor:
        pool = self._pool
        is_decode = part.cumulative is None
        out: Tensor = pool.library.flash_attn_with_kvcache(  # type: ignore[attr-defined]
            q.unsqueeze(1) if is_decode else q,
            pool.keys[layer],
            pool.values[layer],
            cache_seqlens=part.lengths,
            page_table=part.table,
            cu_seqlens_q=part.cumulative,
            max_seqlen_q=None if is_decode else part.longest,
            causal=True,
            scheduler_metadata=metadata,
            num_splits=1 if part.is_mixed else 0,  # 0: as many as the library thinks best
            pack_gqa=True if part.is_mixed else None,
        )
        return out.squeeze(1) if is_decode else out


class _Fa3Plan:
    """`GraphPlan`. A step brings each request's length and seat; slots and page tables are read from its list by a
    kernel that is recorded with the step."""

    def __init__(self, pool: _Pool, tables: PageTables, max_batch: int, max_pages: int, device: torch.device) -> None:
        self._pool = pool
        self._tables = tables
        self._max_batch = max_batch
        self._ring = PinnedRing(device, 2 * max_batch)
        self._rows = torch.zeros(2, max_batch, dtype=torch.int32, device=device)  # lengths, seats
        self._slots = torch.full((max_batch,), -1, dtype=torch.int32, device=device)
        self._table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)

    def fill(self, spans: Sequence[Span]) -> None:
        count = len(spans)
        assert count <= self._max_batch, "a graph is captured for the largest batch it replays"
        columns = SpanColumns.of(spans)
        rows = self._ring.words(2 * self._max_batch).reshape(2, -1)
        rows[0, :count] = columns.ends
        rows[1, :count] = self._tables.seat(columns)
        rows[:, count:] = 0  # no tokens: nothing is written or attended to
        self._ring.send(self._rows)

    def attend(self, batch_size: int) -> Attend:
        lengths, seats = self._rows[:, :batch_size]
        slots, table = self._slots[:batch_size], self._table[:batch_size]
        self._tables.read(seats, lengths, table, slots)
        part = _Part(first=0, lengths=lengths, table=table, cumulative=None, longest=1, is_mixed=False)
        return _Step(self._pool, slots, [part])
