"""Steps recorded once and replayed: one launch instead of several hundred.

Launching a step kernel by kernel costs the host about 12 ms for 28 layers, however little there is to compute. So a
graph is recorded for each padded number of rows, the largest first, in two families (cuda_runner.py): steps of decodes
alone, whose attention may split long contexts, and steps with prompt chunks, up to a few thousand tokens: above that
the device takes longer than the host. All recordings share one pool of memory: they are replayed one after another on
one stream.

A padding row computes token 0 at position 0 and writes no K/V (attention's `GraphPlan` sees to that); what comes out
of it is never looked at.
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
    """One family's recordings. Owned by the runner; every method runs under its inference mode and on its stream."""

    def __init__(self, plan: GraphPlan, step: Callable[[int], Result], pool: _POOL_HANDLE) -> None:
        """`step(size)` launches a step of `size` rows that attends through `plan`, and returns what it computed.
        `pool`: torch.cuda.graph_pool_handle()."""
        self._plan = plan
        self._step = step
        self._pool = pool
        self._sizes: list[int] = []
        self._captured: dict[int, _Captured[Result]] = {}

    def capture(self, sizes: Sequence[int], what: str) -> None:
        """A few seconds. The pages are not touched. `sizes` ascend."""
        start_s, free_bytes = time.perf_counter(), torch.cuda.mem_get_info()[0]
        self._plan.fill([])
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in reversed(sizes):
                self._step(size)  # kernels are compiled and libraries set up outside the recording
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                result = self._step(size)
                graph.capture_end()
                self._captured[size] = _Captured(graph, result)
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
        """The smallest recorded size with room for them; None: there is none."""
        return None if num_rows > self._sizes[-1] else self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, size: int, spans: Sequence[Span]) -> Result:
        """The input words for `size` rows were sent. Returns what `step` did, overwritten by the next replay of any
        size."""
        self._plan.fill(spans)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.result
