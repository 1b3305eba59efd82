"""The interface of an attention backend to the runner.

Before a backend is made, its `AttentionKind` has the devices on which it runs, the steps that can be captured and the
memory that it needs.

Life cycle: `bind` once, with the pool. For each step, `prepare(spans)` turns the batch into index tensors, and the
model calls the returned `Attend` once per layer. A call first rotates q and k and writes the new tokens' K/V into their
pages, then attends over all tokens that each request has so far.

A step may be replayed as a CUDA graph. Its tensors must then keep their addresses: `plan_decode_graph` and
`plan_mixed_graph` make them once for the largest batch, `fill` fills them for each step, and the model calls `attend`
under capture.

The pool is [num_pages, num_kv_heads, num_layers, 2, page_size, head_dim]; index 2: 0 is K, 1 is V. A tensor-parallel
rank passes a view with its own heads. The bytes of a page beyond a request's length are undefined (another request's
old K/V, even NaN) and must not affect the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, overload

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvist.kernels.operands import Rotary

# attend(layer, heads, rotary) -> out [num_tokens, num_q_heads, head_dim]; heads [num_tokens, num_q_heads + 2 *
# num_kv_heads, head_dim]: this rank's q, k and v, in the order of the fused projection; may be a strided view. A call
# first rotates q and k (`rotary` None: they are already rotated) and writes k and v to their pages.
Attend = Callable[[int, Tensor, Rotary | None], Tensor]


class Span(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's new tokens: positions [start, start + num_tokens). Their rows follow those of the previous span.

    A struct and not a dataclass: hundreds are made in each step, at a sixth of the cost.
    """

    start: int  # K/V of [0, start) is already in the pages
    num_tokens: int
    page_ids: Sequence[int]  # at least the pages of positions [0, start + num_tokens)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class SpanColumns(Sequence[Span]):
    """The spans of a step as columns: numpy processes all of them at once, where a Python loop over hundreds in each
    step would keep the GPU waiting. `Span` objects are made on first access."""

    def __init__(
        self, starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32], page_ids: Sequence[Sequence[int]]
    ) -> None:
        """One entry per span: its `start`, `num_tokens` and `page_ids`."""
        self.starts = starts
        self.counts = counts
        self.page_ids = page_ids
        self.ends = starts + counts
        self.num_tokens = int(counts.sum())
        self._spans: list[Span] | None = None

    @classmethod
    def of(cls, spans: Sequence[Span]) -> SpanColumns:
        if isinstance(spans, SpanColumns):
            return spans
        starts, counts = ([span.start for span in spans], [span.num_tokens for span in spans])
        return cls(np.array(starts, np.int32), np.array(counts, np.int32), [span.page_ids for span in spans])

    def positions(self) -> npt.NDArray[np.int32]:
        """Return the position of every new token, [num_tokens], in order."""
        if self.num_tokens == len(self):  # only decodes
            return self.starts
        positions: npt.NDArray[np.int32] = np.arange(self.num_tokens, dtype=np.int32)
        positions += (self.ends - self.counts.cumsum(dtype=np.int32)).repeat(self.counts)
        return positions

    def __len__(self) -> int:
        return len(self.page_ids)

    @overload
    def __getitem__(self, index: int) -> Span: ...
    @overload
    def __getitem__(self, index: slice) -> list[Span]: ...
    def __getitem__(self, index: int | slice) -> Span | list[Span]:
        return self._one_by_one()[index]

    def __iter__(self) -> Iterator[Span]:
        return iter(self._one_by_one())

    def _one_by_one(self) -> list[Span]:
        if self._spans is None:
            columns = zip(self.starts.tolist(), self.counts.tolist(), self.page_ids, strict=True)
            self._spans = [Span(start=start, num_tokens=count, page_ids=pages) for start, count, pages in columns]
        return self._spans


class GraphPlan(Protocol):
    """The index tensors of captured steps, at fixed addresses."""

    def fill(self, spans: Sequence[Span]) -> None:
        """Fill the tensors for the next replay: at most `max_batch` spans, padded to the smallest number of rows that
        `attend` was called with. Padding rows write no page, and their result is undefined. Asynchronous; earlier
        replays on the same stream are not affected."""

    def attend(self, num_rows: int) -> Attend:
        """Return the `Attend` of the first `num_rows` rows. Call it once under each capture: the work that all layers
        share is captured, too. Every number of rows must run once before its capture."""


class AttentionBackend(Protocol):
    name: str

    def bind(self, pool: Tensor) -> None:
        """Use this pool (or view of its heads) from now on."""

    def prepare(self, spans: Sequence[Span]) -> Attend:
        """Return the attention of one step. Spans of one token are cheapest when they come first."""

    def plan_decode_graph(self, max_batch: int, max_pages: int) -> GraphPlan | None:
        """Make the plan of decode batches with at most `max_pages` pages per request. None: they cannot be captured."""

    def plan_mixed_graph(self, max_batch: int, max_pages: int, max_tokens: int) -> GraphPlan | None:
        """Make the plan of batches of decodes and prompt chunks with at most `max_tokens` new tokens in total. None:
        they cannot be captured."""


class Captures(Enum):
    """The steps that can be captured into CUDA graphs. A backend's `plan_*` methods return plans for these steps."""

    NOTHING = "nothing"
    DECODES = "decodes"
    ALL = "all"  # also prompt chunks, and decodes beside them


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSizes:
    """The sizes that a backend's memory depends on."""

    num_q_heads: int  # of this rank, as all heads here
    num_kv_heads: int
    head_dim: int
    num_sms: int  # multiprocessors of the GPU
    decode_graph_sizes: Sequence[int]  # numbers of decodes that are captured; empty: none


def reserve_nothing(sizes: AttentionSizes) -> int:  # noqa: ARG001 (no memory for any sizes)
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """The needs of a backend, known before it is made, and the function that makes it."""

    build: Callable[[torch.device], AttentionBackend]  # raises `ConfigError` with a remedy
    unfit: Callable[[torch.device, torch.dtype], str | None]  # why the backend cannot run there, after its name
    captures: Captures
    reserve_bytes: Callable[[AttentionSizes], int]  # device memory that the backend allocates beside the pool
