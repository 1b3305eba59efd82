"""The runner for GPUs: launches a batch without waiting for the previous batch, and reads the tokens in `result`.

    launch: inputs ──one copy──► device ──► replay a graph │ above the largest graph: launch every kernel
                                               └──► sampled tokens stay in their requests' slots for the next launch
                                                         └──one copy──► pinned memory ──event──► result()

In decode steps the graph also samples the tokens: all parameters of sampling are in tables and columns on the device.
Logprobs are computed after the graph. A step with prompt chunks runs the last layer's MLP and samples outside its
graph: few of its rows need a token, and the host is ahead of the device by then.

All work is queued on one stream, so the pages of a step are written before those of any later step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvist.attention.backend import AttentionBackend, GraphPlan
from kvist.kernels.operands import ShapedRows
from kvist.kernels.sampling import choose_tokens
from kvist.memory.device_pool import DevicePool
from kvist.models.decoder import PartialForward
from kvist.plan.batch import Batch
from kvist.plan.events import SampledTokens
from kvist.runner.columns import EMPTY_BATCH, BatchColumns, read_batch
from kvist.runner.cuda_graphs import StepGraphs
from kvist.runner.graph_sizes import decode_sizes, mixed_sizes
from kvist.runner.inputs import sampling_rows
from kvist.runner.logprobs import LogprobTensors
from kvist.runner.prompt_scores import PromptScores, ScoredRows, score_prompts
from kvist.runner.runner import FinishedBatch, LaunchedBatch, Model
from kvist.runner.sampler import SamplingRow, compute_logprobs, sampled_tokens
from kvist.runner.slots import SlotTable
from kvist.runner.staging import DeviceInputs, Staging


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The limits for which buffers and graphs are made."""

    max_requests: int  # in one batch, and the number of request slots
    max_tokens: int  # in one batch
    max_pages: int  # of one request


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaBatch:
    tokens: Tensor  # int32, pinned
    logprobs: LogprobTensors | None
    scores: PromptScores | None
    constraint_errors: Mapping[int, str]  # as in `SampledTokens`
    done: torch.cuda.Event
    device: torch.device

    def is_done(self) -> bool:
        return bool(self.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        with torch.cuda.device(self.device):  # else a new thread would open a context on the first GPU
            self.done.synchronize()  # without a timeout; engine/watchdog.py detects a stuck device

    def result(self) -> SampledTokens:
        self.wait()
        sampled = sampled_tokens(self.tokens, self.logprobs)
        if self.constraint_errors:
            sampled = replace(sampled, constraint_errors=self.constraint_errors)
        return sampled if self.scores is None else replace(sampled, prompt_logprobs=self.scores.by_item())


class CudaRunner:
    def __init__(
        self,
        *,
        model: Model,
        pool: DevicePool,
        attention: AttentionBackend,
        limits: StepLimits,
        table: SlotTable,
        use_graphs: bool = True,
        pool_reason: str = "",
    ) -> None:
        """`attention` must be bound to the pool; `table` must have `limits.max_requests` slots."""
        self.pool = pool
        self.pool_reason = pool_reason
        self.attention_name = attention.name
        self._model = model
        self._attention = attention
        self._staging = Staging(
            num_slots=limits.max_requests,
            num_tokens=max(limits.max_tokens, limits.max_requests),
            device=pool.tensor.device,
        )
        self._table = table
        self._previous = EMPTY_BATCH  # the batch launched last
        self._decodes: StepGraphs[Tensor] | None = None
        self._mixed: StepGraphs[PartialForward] | None = None
        if use_graphs:
            with torch.inference_mode():
                self._capture(limits)

    def launch(self, batch: Batch) -> LaunchedBatch:
        """Launch a batch; a batch without items only ends and starts requests. Raises if the launch fails; `result`
        raises an error of the execution."""
        previous, self._previous = self._previous, EMPTY_BATCH
        self._table.update(batch)
        if not batch.items:
            return FinishedBatch(SampledTokens(token_ids=()))
        columns = read_batch(batch, previous, self._table)
        rows = sampling_rows(batch.items, self._table) if columns.persistent.wants_logprobs else None
        scored = ScoredRows.of(batch.items, self._table.scoring)
        try:
            with torch.inference_mode():
                self._table.shaping.before_step(batch.items)
                logprobs, scores = self._compute(columns, rows, scored)
                tokens = self._staging.start_read(len(columns.inputs.rows))
                if logprobs is not None:
                    logprobs = logprobs.start_copy()
                if scores is not None:
                    scores = scores.start_copy()
        except BaseException:
            torch.cuda.synchronize()  # queued kernels write pages that the scheduler is about to reuse
            raise
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._previous = columns.persistent
        return CudaBatch(
            tokens=tokens,
            logprobs=logprobs,
            scores=scores,
            constraint_errors=self._table.matchers.errors([item.slot for item in batch.items if item.samples]),
            done=done,
            device=self.pool.tensor.device,
        )

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
        if mixed is not None:  # the family with the largest graphs first: the others reuse its memory
            self._mixed = StepGraphs(mixed, partial(self._begin, mixed), pool)
            self._mixed.capture(mixed_sizes(limits.max_tokens), "steps with prompt chunks")
        self._decodes = StepGraphs(decodes, partial(self._decode, decodes), pool)
        self._decodes.capture(decode_sizes(limits.max_requests), "decodes")

    def _begin(self, plan: GraphPlan, size: int) -> PartialForward:
        inputs = self._staging.views(size, 0)
        return self._model.begin_forward(inputs.token_ids(), inputs.positions, plan.attend(size))

    def _decode(self, plan: GraphPlan, size: int) -> Tensor:
        """Return hidden [size, hidden_size]; the sampled tokens are staged."""
        hidden = self._model.finish_forward(self._begin(plan, size))
        inputs = self._staging.views(size, size)
        self._choose(self._model.logits(hidden), inputs)
        return hidden

    def _compute(
        self, columns: BatchColumns, rows: Sequence[SamplingRow] | None, scored: ScoredRows | None
    ) -> tuple[LogprobTensors | None, PromptScores | None]:
        """Compute a step. `rows` None: no row needs logprobs."""
        host, spans = columns.inputs, columns.spans
        num_tokens, num_sampled = len(host.token_ids), len(host.rows)
        if columns.only_decodes and self._decodes and (size := self._decodes.size_for(num_tokens)):
            assert scored is None, "a row that samples its token scores none: the next token is not known"
            self._staging.send(host, size, size)
            hidden = self._decodes.replay(size, spans)
            return None if rows is None else self._logprobs(self._model.logits(hidden[:num_sampled]), rows), None
        if self._mixed and (size := self._mixed.size_for(num_tokens)):
            self._staging.send(host, size, num_sampled)
            unfinished = self._mixed.replay(size, spans)
            inputs = self._staging.views(size, num_sampled)
        else:
            self._staging.send(host, num_tokens, num_sampled)
            inputs = self._staging.views(num_tokens, num_sampled)
            unfinished = self._model.begin_forward(inputs.token_ids(), inputs.positions, self._attention.prepare(spans))
        scores = None if scored is None else score_prompts(self._model, unfinished, scored)
        if not num_sampled:
            self._model.barrier(unfinished)
            return None, scores
        logits = self._model.logits(self._model.finish_forward(unfinished.select(inputs.rows)))
        own_logits = logits if rows is None else logits.clone()
        self._choose(own_logits, inputs)
        return None if rows is None else self._logprobs(logits, rows), scores

    def _choose(self, logits: Tensor, inputs: DeviceInputs) -> None:
        """Choose a token for each row and stage the tokens. Changes `logits`."""
        shaped = ShapedRows(tables=self._table.shaping.tables, slots=inputs.slots, flags=inputs.flags)
        self._staging.write_sampled(choose_tokens(logits, inputs.columns, shaped), inputs.slots)

    def _logprobs(self, logits: Tensor, rows: Sequence[SamplingRow]) -> LogprobTensors | None:
        return compute_logprobs(logits, rows, self._staging.sampled(len(rows)).long())
