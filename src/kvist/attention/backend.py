"""The door of attention: what the runner asks of a backend, whatever computes it.

Life cycle: `bind` once, with the pool; then for each step `prepare(spans)` turns the batch into index tensors once,
and the returned `Attend` is called once a layer by the model. A call first writes the new tokens' K/V into their
pages, then attends over everything each request has so far.

A step of decodes alone may be replayed as a CUDA graph. Its tensors must then stay where they are: `plan_graph` makes
them once for the largest batch, `fill` refills them for each step, `attend` is what the model calls under capture.

The pool is [num_pages, num_kv_heads, num_layers, 2, page_size, head_dim]; index 2: 0 is K, 1 is V. A tensor-parallel
rank passes a view with its own heads. What lies in a page beyond a request's length is undefined (another request's
old K/V, even NaN) and must not touch the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import msgspec
from torch import Tensor

from kvist.kernels.rotary import Rotary

# attend(layer, q, k, v) -> out; q, out [num_tokens, num_q_heads, head_dim], k, v [num_tokens, num_kv_heads, head_dim]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class RotatingAttend(Protocol):
    """An `Attend` that can also rotate q and k itself, on the way into the pages: one kernel instead of five."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...

    def rotated(self, layer: int, heads: Tensor, rotary: Rotary) -> Tensor:
        """heads [num_tokens, num_q_heads + 2 * num_kv_heads, head_dim], as the fused projection has them: q, k, v."""
        ...


class Span(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request's new tokens: positions [start, start + num_tokens). Their rows follow the former span's.

    A struct and not a dataclass: hundreds are made in each step, at a sixth of the price.
    """

    start: int  # K/V of [0, start) is already in the pages
    num_tokens: int
    page_ids: Sequence[int]  # at least for positions [0, start + num_tokens)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class GraphPlan(Protocol):
    """The index tensors of steps of decodes, at addresses that last."""

    def fill(self, spans: Sequence[Span]) -> None:
        """Describe the next replay: spans of one token each, at most `max_batch`, for the smallest batch size with
        room for them that `attend` was called for. Rows beyond them write nothing and attend to nothing. Asynchronous;
        replays on the same stream that were launched before are not disturbed."""
        ...

    def attend(self, batch_size: int) -> Attend:
        """For the first `batch_size` rows. Call it anew under each capture: what all layers share is recorded too. A
        size must have run once before it is captured."""
        ...


class AttentionBackend(Protocol):
    name: str

    def bind(self, pool: Tensor) -> None:
        """Work on this pool (or view of its heads) from now on."""
        ...

    def prepare(self, spans: Sequence[Span]) -> Attend:
        """The attention of one step. Spans of one token are cheapest when they come first."""
        ...

    def plan_graph(self, max_batch: int, max_pages: int) -> GraphPlan | None:
        """For batches of decodes with at most `max_pages` pages each. None: this backend cannot be captured."""
        ...
