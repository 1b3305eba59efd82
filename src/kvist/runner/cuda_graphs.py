"""Steps of decodes alone, recorded once and replayed: one launch instead of several hundred.

A graph is recorded for each padded batch size, the largest first, and all share one pool of memory: they are replayed
one after another on one stream. Recorded is everything from the input words to the chosen tokens. A padding row
computes token 0 at position 0 and writes no K/V (attention's `GraphPlan` sees to that); its token is never looked at.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.attention.backend import GraphPlan, Span
from kvist.kernels.sampling import choose_tokens
from kvist.runner.graph_sizes import padded_sizes
from kvist.runner.runner import Model
from kvist.runner.staging import Staging

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [size, hidden_size], after a replay


class DecodeGraphs:
    """Owned by the runner. Every method runs under its inference mode and on its stream."""

    def __init__(self, model: Model, plan: GraphPlan, staging: Staging) -> None:
        self._model = model
        self._plan = plan
        self._staging = staging
        self._sizes: list[int] = []
        self._captured: dict[int, _Captured] = {}

    def capture(self, max_batch: int) -> None:
        """A few seconds. The pages are not touched."""
        start_s, free_bytes = time.perf_counter(), torch.cuda.mem_get_info()[0]
        sizes = padded_sizes(max_batch)
        self._plan.fill([])
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):
            for size in reversed(sizes):
                self._step(size)  # kernels are compiled and libraries set up outside the recording
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                hidden = self._step(size)
                graph.capture_end()
                self._captured[size] = _Captured(graph, hidden)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # of the side stream
        self._sizes = sizes
        used_mib = (free_bytes - torch.cuda.mem_get_info()[0]) >> 20
        seconds = time.perf_counter() - start_s
        log.info("CUDA graphs: %d batch sizes up to %d in %.1f s, %d MiB", len(sizes), max_batch, seconds, used_mib)

    @property
    def largest(self) -> int:
        return self._sizes[-1]

    def size_for(self, num_rows: int) -> int:
        """The smallest recorded size with room for them."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, size: int, spans: Sequence[Span]) -> Tensor:
        """The words of (size, size) were sent. The tokens are in the slots then; returns hidden [size, hidden_size],
        overwritten by the next replay."""
        self._plan.fill(spans)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.hidden

    def _step(self, size: int) -> Tensor:
        words = self._staging.views(size, size)
        hidden = self._model.forward(words.token_ids(), words.positions, self._plan.attend(size))
        self._staging.keep(choose_tokens(self._model.logits(hidden), words.temperatures, words.keys))
        return hidden
