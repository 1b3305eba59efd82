"""The GPU's runner: a batch is launched without waiting for the one before, and read when its tokens are wanted.

    launch: words ──one copy──► device ──► decodes alone: replay a graph │ prompt chunks too: launch every kernel
                                              └──► chosen tokens stay in their slots for the next launch
                                                        └──one copy──► pinned memory ──event──► result()

Tokens that plain temperature sampling chooses come out of the graph. Rows that want more (top_k, top_p, min_p, tokens
suppressed, logprobs) are chosen again from their logits, still on the device.

All work goes to one stream, so a page that is given to another request later is written later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.attention.backend import AttentionBackend, Span
from kvist.kernels.sampling import choose_tokens
from kvist.kv.device import DevicePool
from kvist.request import RequestId, SampledToken
from kvist.runner.columns import NOBODY, read_batch
from kvist.runner.cuda_graphs import DecodeGraphs
from kvist.runner.inputs import sampling_rows
from kvist.runner.runner import InFlight, Model
from kvist.runner.sampler import (
    Measured,
    SamplingRow,
    choose,
    measure,
    sampled_tokens,
)
from kvist.runner.staging import HostWords, Staging
from kvist.scheduler.plan import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """What buffers and graphs are made for."""

    max_requests: int  # in one batch
    max_tokens: int  # in one batch
    max_pages: int  # of one request


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    request_ids: Sequence[RequestId]  # those that get a token, in the order of `tokens`
    tokens: Tensor  # [len(request_ids)] int32, pinned
    measured: Measured | None
    done: torch.cuda.Event

    def result(self) -> Mapping[RequestId, SampledToken]:
        self.done.synchronize()
        logprobs = {} if self.measured is None else self.measured.logprobs()
        return dict(zip(self.request_ids, sampled_tokens(self.tokens.tolist(), logprobs), strict=True))


class CudaRunner:
    def __init__(
        self,
        *,
        model: Model,
        pool: DevicePool,
        attention: AttentionBackend,
        limits: StepLimits,
        use_graphs: bool = True,
        pool_reason: str = "",
    ) -> None:
        """`attention` is bound to the pool."""
        self.pool = pool
        self.pool_reason = pool_reason
        self.attention_name = attention.name
        self._model = model
        self._attention = attention
        self._staging = Staging(
            num_rows=limits.max_requests,
            num_tokens=max(limits.max_tokens, limits.max_requests),
            device=pool.tensor.device,
        )
        self._former = NOBODY  # of the batch launched last
        self._graphs: DecodeGraphs | None = None
        plan = attention.plan_graph(limits.max_requests, limits.max_pages) if use_graphs else None
        if plan is not None:
            with torch.inference_mode():
                self._graphs = DecodeGraphs(model, plan, self._staging)
                self._graphs.capture(limits.max_requests)

    def launch(self, batch: Batch) -> InFlight:
        """Raises when the device refused the work; what the device meets on the way is raised by `result`."""
        assert batch.items, "an empty batch is no batch"
        former, self._former = self._former, NOBODY
        columns = read_batch(batch.items, former)
        rows = None if columns.is_plain else sampling_rows(batch)
        with torch.inference_mode():
            if self._graphs is not None and columns.only_decodes and len(batch.items) <= self._graphs.largest:
                measured = self._replay(self._graphs, columns.words, columns.spans, rows)
            else:
                measured = self._launch_all(columns.words, columns.spans, rows)
            request_ids = [*columns.roster.slots]
            tokens = self._staging.start_read(len(request_ids))
            if measured is not None:
                measured = measured.start_copy()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._former = columns.roster
        return Launched(request_ids=request_ids, tokens=tokens, measured=measured, done=done)

    def execute(self, batch: Batch) -> Mapping[RequestId, SampledToken]:
        return self.launch(batch).result()

    def close(self) -> None:
        """Drop the graphs and the pool."""
        torch.cuda.synchronize()
        self._graphs = None
        self.pool.close()

    def _replay(
        self, graphs: DecodeGraphs, host: HostWords, spans: Sequence[Span], rows: Sequence[SamplingRow] | None
    ) -> Measured | None:
        """Every item is one token that wants the next one. `rows` None: the graph chooses them all."""
        size = graphs.size_for(len(spans))
        self._staging.send(host, size, size)
        hidden = graphs.replay(size, spans)
        return None if rows is None else self._choose_and_measure(self._model.logits(hidden[: len(rows)]), rows)

    def _launch_all(
        self, host: HostWords, spans: Sequence[Span], rows: Sequence[SamplingRow] | None
    ) -> Measured | None:
        num_tokens, num_sampled = len(host.token_ids), len(host.rows)
        self._staging.send(host, num_tokens, num_sampled)
        words = self._staging.views(num_tokens, num_sampled)
        hidden = self._model.forward(words.token_ids(), words.positions, self._attention.prepare(spans))
        if not num_sampled:
            return None
        logits = self._model.logits(hidden.index_select(0, words.rows))
        if rows is not None:
            return self._choose_and_measure(logits, rows)
        self._staging.keep(choose_tokens(logits, words.temperatures, words.keys))
        return None

    def _choose_and_measure(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Measured | None:
        chosen = choose(logits, rows)
        self._staging.keep(chosen)
        return measure(logits, rows, chosen)
