"""The GPU's runner: a batch is launched without waiting for the one before, and read when its tokens are wanted.

    launch: words ──one copy──► device ──► replay a graph │ too many tokens for one: launch every kernel
                                              └──► chosen tokens stay in their slots for the next launch
                                                        └──one copy──► pinned memory ──event──► result()

In steps of decodes alone the graph chooses the tokens, too. Rows that want more than temperature (top_k, top_p, min_p,
tokens suppressed, logprobs) are chosen again from their logits, still on the device. A step with prompt chunks goes
through the last layer's MLP and chooses behind its graph: few of its rows want a token, and the host is ahead of the
device by then.

All work goes to one stream, so a page that is given to another request later is written later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvist.attention.backend import AttentionBackend, GraphPlan, Span
from kvist.kernels.sampling import choose_tokens
from kvist.kv.device import DevicePool
from kvist.models.decoder import Unfinished
from kvist.request import RequestId, SampledToken
from kvist.runner.cuda_graphs import StepGraphs
from kvist.runner.graph_sizes import decode_sizes, mixed_sizes
from kvist.runner.inputs import sampling_rows
from kvist.runner.runner import InFlight, Model
from kvist.runner.sampler import (
    Measured,
    SamplingRow,
    all_plain,
    choose,
    measure,
    noise_key_words,
    sampled_tokens,
)
from kvist.runner.staging import HostWords, Staging
from kvist.scheduler.plan import Batch, BatchItem


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

    def is_done(self) -> bool:
        return bool(self.done.query())  # type: ignore[no-untyped-call]

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
        self._slots: Mapping[RequestId, int] = {}  # of the batch launched last
        self._decodes: StepGraphs[Tensor] | None = None
        self._mixed: StepGraphs[Unfinished] | None = None
        if use_graphs:
            with torch.inference_mode():
                self._capture(limits)

    def launch(self, batch: Batch) -> InFlight:
        """Raises when the device refused the work; what the device meets on the way is raised by `result`."""
        assert batch.items, "an empty batch is no batch"
        slots, self._slots = self._slots, {}
        host = _host_words(batch.items, slots)
        rows = None if all_plain(batch.items) else sampling_rows(batch)
        spans = [Span(start=item.start, num_tokens=item.num_tokens, page_ids=item.page_ids) for item in batch.items]
        with torch.inference_mode():
            measured = self._compute(host, spans, rows)
            request_ids = [item.request_id for item in batch.items if item.sampling is not None]
            tokens = self._staging.start_read(len(request_ids))
            if measured is not None:
                measured = measured.start_copy()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._slots = dict(zip(request_ids, range(len(request_ids)), strict=True))
        return Launched(request_ids=request_ids, tokens=tokens, measured=measured, done=done)

    def execute(self, batch: Batch) -> Mapping[RequestId, SampledToken]:
        return self.launch(batch).result()

    def close(self) -> None:
        """Drop the graphs and the pool."""
        torch.cuda.synchronize()
        self._decodes = self._mixed = None
        self.pool.close()

    def _capture(self, limits: StepLimits) -> None:
        decodes = self._attention.plan_decode_graph(limits.max_requests, limits.max_pages)
        if decodes is None:
            return
        pool = torch.cuda.graph_pool_handle()
        mixed = self._attention.plan_mixed_graph(limits.max_requests, limits.max_pages, limits.max_tokens)
        if mixed is not None:  # the family with the largest recordings first: the others find room in its memory
            self._mixed = StepGraphs(mixed, partial(self._begin, mixed), pool)
            self._mixed.capture(mixed_sizes(limits.max_tokens), "steps with prompt chunks")
        self._decodes = StepGraphs(decodes, partial(self._decode, decodes), pool)
        self._decodes.capture(decode_sizes(limits.max_requests), "decodes")

    def _begin(self, plan: GraphPlan, size: int) -> Unfinished:
        words = self._staging.views(size, 0)
        return self._model.begin(words.token_ids(), words.positions, plan.attend(size))

    def _decode(self, plan: GraphPlan, size: int) -> Tensor:
        """hidden [size, hidden_size]; the chosen tokens are in their slots."""
        hidden = self._model.finish(self._begin(plan, size))
        words = self._staging.views(size, size)
        self._staging.keep(choose_tokens(self._model.logits(hidden), words.temperatures, words.keys))
        return hidden

    def _compute(self, host: HostWords, spans: Sequence[Span], rows: Sequence[SamplingRow] | None) -> Measured | None:
        """`rows` None: every row is content with what temperature sampling chooses."""
        num_tokens, num_sampled = len(host.token_ids), len(host.rows)
        if num_tokens == num_sampled and self._decodes and (size := self._decodes.size_for(num_tokens)):
            self._staging.send(host, size, size)
            hidden = self._decodes.replay(size, spans)
            return None if rows is None else self._choose_and_measure(self._model.logits(hidden[:num_sampled]), rows)
        if self._mixed and (size := self._mixed.size_for(num_tokens)):
            self._staging.send(host, size, num_sampled)
            unfinished = self._mixed.replay(size, spans)
            words = self._staging.views(size, num_sampled)
        else:
            self._staging.send(host, num_tokens, num_sampled)
            words = self._staging.views(num_tokens, num_sampled)
            unfinished = self._model.begin(words.token_ids(), words.positions, self._attention.prepare(spans))
        if not num_sampled:
            return None
        logits = self._model.logits(self._model.finish(unfinished.select(words.rows)))
        if rows is not None:
            return self._choose_and_measure(logits, rows)
        self._staging.keep(choose_tokens(logits, words.temperatures, words.keys))
        return None

    def _choose_and_measure(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Measured | None:
        chosen = choose(logits, rows)
        self._staging.keep(chosen)
        return measure(logits, rows, chosen)


def _host_words(items: Sequence[BatchItem], slots: Mapping[RequestId, int]) -> HostWords:
    sampled = [item for item in items if item.sampling is not None]
    if len(sampled) == len(items) and all(item.takes_sampled or len(item.token_ids) == 1 for item in items):
        token_ids = [0 if item.takes_sampled else item.token_ids[0] for item in items]
        positions: Sequence[int] = [item.start for item in items]
        rows: Sequence[int] = range(len(items))
        unknown = [row for row, item in enumerate(items) if item.takes_sampled]
    else:
        token_ids, positions, rows, unknown = _flatten(items)
    temperatures = [item.sampling.temperature for item in sampled if item.sampling is not None]
    keys = None
    if any(temperatures):
        seeds = [item.sampling.seed for item in sampled if item.sampling is not None]
        keys = noise_key_words(seeds, [item.end for item in sampled])
    return HostWords(
        token_ids=token_ids,
        unknown=unknown,
        slots=[slots[item.request_id] for item in items if item.takes_sampled],
        positions=positions,
        rows=rows,
        temperatures=temperatures,
        keys=keys,
    )


def _flatten(items: Sequence[BatchItem]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Token ids, positions; rows that want a token; rows whose token is not known."""
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    unknown: list[int] = []
    for item in items:
        if item.takes_sampled:
            unknown.append(len(token_ids))
            token_ids.append(0)
        else:
            token_ids += item.token_ids
        positions += range(item.start, item.end)
        if item.sampling is not None:
            rows.append(len(token_ids) - 1)
    return token_ids, positions, rows, unknown
