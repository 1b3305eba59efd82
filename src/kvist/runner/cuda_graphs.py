"""Steps captured once as CUDA graphs and replayed: one launch instead of several hundred.

To launch a step kernel by kernel takes the host about 12 ms for 28 layers, however small the step is. Therefore a graph
is captured for each padded number of rows, the largest first, in three families (cuda_runner.py): decode steps, whose
attention may split long contexts, the choice of their tokens, and steps with prompt chunks, up to a few thousand
tokens. In larger steps the device takes longer than the host. All graphs can share one memory pool, because they are
replayed one after another on one stream.

A padding row computes token 0 at position 0 and writes no K/V (attention's `GraphPlan` ensures that); its result is
never read.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from kvist.attention.backend import GraphPlan, Span

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

logger = logging.getLogger(__name__)


Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Captured(Generic[Result]):
    graph: torch.cuda.CUDAGraph
    result: Result  # the tensors that a replay writes


class StepGraphs(Generic[Result]):
    """The graphs of one family. Owned by the runner; every method runs under its inference mode and on its stream."""

    def __init__(self, plan: GraphPlan | None, step: Callable[[int], Result], pool: _POOL_HANDLE) -> None:
        """`step(size)` launches a step of `size` rows that attends through `plan`, and returns its result tensors; it
        has no attention if `plan` is None. `pool`: torch.cuda.graph_pool_handle()."""
        self._plan = plan
        self._step = step
        self._pool = pool
        self._sizes: list[int] = []
        self._captured: dict[int, _Captured[Result]] = {}

    def capture(self, sizes: Sequence[int], what: str, captured: Callable[[], None]) -> None:
        """Capture a graph for each of `sizes`, which are in ascending order; call `captured` after each. Takes a few
        seconds; no page is written."""
        start_s, free_bytes = time.perf_counter(), torch.cuda.mem_get_info()[0]
        if self._plan is not None:
            self._plan.fill([])
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in reversed(sizes):
                self._step(size)  # compiles kernels and initialises libraries outside the capture
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                result = self._step(size)
                graph.capture_end()
                self._captured[size] = _Captured(graph, result)
                captured()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of the side stream
        self._sizes = list(sizes)
        used_mib = (free_bytes - torch.cuda.mem_get_info()[0]) >> 20
        seconds = time.perf_counter() - start_s
        logger.info(
            "CUDA graphs of %s: %d sizes up to %d in %.1f s, %d MiB", what, len(sizes), sizes[-1], seconds, used_mib
        )

    def size_for(self, num_rows: int) -> int | None:
        """Return the smallest captured size with at least `num_rows` rows, or None."""
        return None if num_rows > self._sizes[-1] else self._sizes[bisect_left(self._sizes, num_rows)]

    def result(self, size: int) -> Result:
        """Return the result tensors of a captured size, which each replay of that size writes."""
        return self._captured[size].result

    def replay(self, size: int, spans: Sequence[Span]) -> Result:
        """Replay the graph of `size` rows, whose inputs must have been sent. Return the result tensors of `step`, which
        the next replay of any size overwrites."""
        if self._plan is not None:
            self._plan.fill(spans)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.result
