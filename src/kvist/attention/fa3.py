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

from kvist.attention.backend import Attend, GraphPlan, Span
from kvist.attention.page_tables import PageTables, upload
from kvist.attention.slots import written_slots
from kvist.errors import ConfigError
from kvist.kernels.rotary import Rotary, rotate_and_write

_FEW_DECODES, _LONG_TOKENS = 32, 2048  # fewer decodes than this leave multiprocessors idle; shorter ones end soon
_UNSPLIT_TOKENS = 16_384  # an unsplit decode of a longer context would hold up the chunks of its step
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
        size = self._pool.page_size
        ends = [span.end for span in spans]
        slots = written_slots(spans, size)
        cut = self._cut(spans)
        starts = [0, *accumulate(span.num_tokens for span in spans[cut:])]
        packed = np.concatenate(
            [np.asarray(part, dtype=np.int32) for part in (ends, self._tables.seat(spans), starts, slots)]
        )
        sizes = [len(spans), len(spans), len(starts), len(slots)]
        lengths, seats, cumulative, slots_tensor = torch.split(upload(packed, self._device), sizes)
        parts = []
        for low, high in ((0, cut), (cut, len(spans))):
            if low < high:
                part = _Part(
                    first=low,
                    lengths=lengths[low:high],
                    table=self._tables.select(seats[low:high], -(-max(ends[low:high]) // size)),
                    cumulative=None if high == cut else cumulative,
                    longest=max(span.num_tokens for span in spans[low:high]),
                    is_mixed=high > cut and spans[low].num_tokens == 1,
                )
                parts.append(part)
        return _Step(self._pool, slots_tensor, parts)

    def _cut(self, spans: Sequence[Span]) -> int:
        """Spans before it are decodes that get a call of their own; those behind it share one."""
        num_decodes = next((i for i, span in enumerate(spans) if span.num_tokens != 1), len(spans))
        if num_decodes == len(spans):
            return num_decodes
        longest = max((span.end for span in spans[:num_decodes]), default=0)
        return num_decodes if num_decodes < _FEW_DECODES and longest > _LONG_TOKENS else 0

    def plan_decode_graph(self, max_batch: int, max_pages: int) -> GraphPlan:
        self._tables.reserve(2 * max_batch, max_pages)
        return _DecodePlan(self._pool, self._tables, max_batch, max_pages, self._device)

    def plan_mixed_graph(self, max_batch: int, max_pages: int, max_tokens: int) -> GraphPlan:
        self._tables.reserve(2 * max_batch, max_pages)
        return _MixedPlan(self._pool, self._tables, max_batch, max_pages, max_tokens)


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


class _DecodePlan:
    """`GraphPlan`: lengths, slots and page tables at lasting addresses."""

    def __init__(self, pool: _Pool, tables: PageTables, max_batch: int, max_pages: int, device: torch.device) -> None:
        self._pool = pool
        self._tables = tables
        self._max_batch = max_batch
        self._device = device
        self._rows = torch.zeros(3, max_batch, dtype=torch.int32, device=device)  # lengths, slots, seats
        self._rows[1] = -1
        self._table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)

    def suits(self, spans: Sequence[Span]) -> bool:
        return len(spans) <= self._max_batch

    def fill(self, spans: Sequence[Span]) -> None:
        count, size = len(spans), self._pool.page_size
        assert count <= self._max_batch, "a graph is captured for the largest batch it replays"
        rows = np.zeros((3, self._max_batch), dtype=np.int32)
        rows[0, :count] = [span.end for span in spans]
        rows[1, :count] = written_slots(spans, size)
        rows[1, count:] = -1
        rows[2, :count] = self._tables.seat(spans)
        self._rows.copy_(torch.from_numpy(rows).pin_memory(), non_blocking=True)
        self._tables.select_into(self._rows[2], self._table)

    def attend(self, num_rows: int) -> Attend:
        part = _Part(
            first=0,
            lengths=self._rows[0, :num_rows],
            table=self._table[:num_rows],
            cumulative=None,
            longest=1,
            is_mixed=False,
        )
        return _Step(self._pool, self._rows[1, :num_rows], [part])


class _MixedPlan:
    """`GraphPlan` of decodes and chunks in one call. Every recording is made for `max_batch` spans; those that a step
    does not have are empty, and cost the library next to nothing."""

    def __init__(self, pool: _Pool, tables: PageTables, max_batch: int, max_pages: int, max_tokens: int) -> None:
        self._pool = pool
        self._tables = tables
        self._max_batch = max_batch
        device = pool.layers[0].device
        # lengths B | seats B | cumulative B + 1 | slots T
        self._packed = torch.zeros(3 * max_batch + 1 + max_tokens, dtype=torch.int32, device=device)
        sizes = [max_batch, max_batch, max_batch + 1, max_tokens]
        self._lengths, self._seats, self._cumulative, self._slots = torch.split(self._packed, sizes)
        self._slots.fill_(-1)
        self._table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)

    def suits(self, spans: Sequence[Span]) -> bool:
        longest = max((span.end for span in spans if span.num_tokens == 1), default=0)
        return len(spans) <= self._max_batch and longest <= _UNSPLIT_TOKENS

    def fill(self, spans: Sequence[Span]) -> None:
        count, batch = len(spans), self._max_batch
        packed = np.zeros(self._packed.shape[0], dtype=np.int32)
        packed[:count] = [span.end for span in spans]
        packed[batch : batch + count] = self._tables.seat(spans)
        cumulative = packed[2 * batch : 3 * batch + 1]
        cumulative[1 : count + 1] = np.cumsum([span.num_tokens for span in spans])
        cumulative[count + 1 :] = cumulative[count]
        slots = written_slots(spans, self._pool.page_size)
        packed[3 * batch + 1 :] = -1
        packed[3 * batch + 1 : 3 * batch + 1 + len(slots)] = slots
        self._packed.copy_(torch.from_numpy(packed).pin_memory(), non_blocking=True)
        self._tables.select_into(self._seats, self._table)

    def attend(self, num_rows: int) -> Attend:
        part = _Part(
            first=0,
            lengths=self._lengths,
            table=self._table,
            cumulative=self._cumulative,
            longest=num_rows,
            is_mixed=True,
        )
        return _Step(self._pool, self._slots[:num_rows], [part])
