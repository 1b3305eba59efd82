"""The door of attention: what the runner asks of a backend, whatever computes it.

Life cycle: `bind` once, with the pool; then for each step `prepare(spans)` turns the batch into index tensors once,
and the returned `Attend` is called once a layer by the model. A call first writes the new tokens' K/V into their
pages, then attends over everything each request has so far.

A step may be replayed as a CUDA graph. Its tensors must then stay where they are: `plan_decode_graph` and
`plan_mixed_graph` make them once for the largest batch, `fill` refills them for each step, `attend` is what the model
calls under capture.

The pool is [num_pages, num_kv_heads, num_layers, 2, page_size, head_dim]; index 2: 0 is K, 1 is V. A tensor-parallel
rank passes a view with its own heads. What lies in a page beyond a request's length is undefined (another request's
old K/V, even NaN) and must not touch the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, overload, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvist.kernels.operands import Rotary

# attend(layer, q, k, v) -> out; q, out [num_tokens, num_q_heads, head_dim], k, v [num_tokens, num_kv_heads, head_dim],
# this rank's heads, q and k already rotated; they may be strided views. It writes k and v to their pages first.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class RotatingAttend(Protocol):
    """An `Attend` that can also rotate q and k itself, on the way into the pages: one kernel instead of five."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...

    def rotated(self, layer: int, heads: Tensor, rotary: Rotary) -> Tensor:
        """heads [num_tokens, num_q_heads + 2 * num_kv_heads, head_dim], as the fused projection has them: q, k, v."""


class Span(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's new tokens: positions [start, start + num_tokens). Their rows follow the previous span's.

    A struct and not a dataclass: hundreds are made in each step, at a sixth of the price.
    """

    start: int  # K/V of [0, start) is already in the pages
    num_tokens: int
    page_ids: Sequence[int]  # at least for positions [0, start + num_tokens)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class SpanColumns(Sequence[Span]):
    """The spans of a step as columns: numpy takes all of them at once, where a loop over hundreds in each step would
    keep the GPU waiting. Who wants them one by one finds them made when first asked for."""

    def __init__(
        self, starts: npt.NDArray[np.int32], counts: npt.NDArray[np.int32], page_ids: Sequence[Sequence[int]]
    ) -> None:
        """One entry a span: its `start`, `num_tokens` and `page_ids`."""
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
        """[num_tokens] of every new token, in order."""
        if self.num_tokens == len(self):  # decodes alone
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
    """The index tensors of steps, at addresses that last."""

    def fill(self, spans: Sequence[Span]) -> None:
        """Describe the next replay: at most `max_batch` spans, for the smallest number of rows with room for them that
        `attend` was called for. Rows beyond the spans' write nothing and their result is undefined. Asynchronous;
        replays on the same stream that were launched before are not disturbed."""

    def attend(self, num_rows: int) -> Attend:
        """For the first `num_rows` rows. Call it anew under each capture: what all layers share is recorded too. A
        number must have run once before it is captured."""


class AttentionBackend(Protocol):
    name: str

    def bind(self, pool: Tensor) -> None:
        """Work on this pool (or view of its heads) from now on."""

    def prepare(self, spans: Sequence[Span]) -> Attend:
        """The attention of one step. Spans of one token are cheapest when they come first."""

    def plan_decode_graph(self, max_batch: int, max_pages: int) -> GraphPlan | None:
        """For batches of decodes with at most `max_pages` pages each. None: this backend cannot be captured."""

    def plan_mixed_graph(self, max_batch: int, max_pages: int, max_tokens: int) -> GraphPlan | None:
        """The same for batches of decodes and prompt chunks, `max_tokens` new tokens in all."""
