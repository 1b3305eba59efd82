"""The runner for GPUs: launches a batch without waiting for the previous batch, and reads the tokens in `result`.

    launch: inputs ──one copy──► device ──► forward pass: replay a graph │ above the largest graph: launch every kernel
                                               └──► choice: sampled tokens stay in their requests' slots
                                                         └──one copy──► pinned memory ──event──► result()

In decode steps the choice is a graph, too: all parameters of sampling are in tables and columns on the device. Logprobs
are computed after it. A step with prompt chunks runs the last layer's MLP and samples outside its graph: few of its
rows need a token, and the host is ahead of the device by then.

The bans of a constrained request follow from its tokens, which only the host can follow (answers.py). If a batch needs
a token of the batch before, its forward pass is launched at once, and its choice when that batch is read:

    device: ── forward N ── choice N ──┬── forward N+1 ──────────────────── choice N+1 ── …
    host:                    read N ───┴► accept, masks, bans ─► launch choice N+1, then batch N+2

The device has no pause if the masks take the host less time than forward pass N+1 takes the device.

All work is queued on one stream, so the pages of a step are written before those of any later step.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvist.attention.backend import AttentionBackend, GraphPlan
from kvist.errors import EngineError
from kvist.kernels.operands import ShapedRows
from kvist.kernels.sampling import choose_tokens
from kvist.memory.device_pool import DevicePool
from kvist.models.decoder import PartialForward
from kvist.plan.batch import Batch
from kvist.plan.events import SampledTokens
from kvist.runner.answers import FollowedRows, SlotAnswers, errors_of
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
class StepOutputs:
    """The results of a step on the host. Valid when `done` has happened."""

    tokens: Tensor  # int32, pinned
    logprobs: LogprobTensors | None
    scores: PromptScores | None
    done: torch.cuda.Event
    device: torch.device


class CudaBatch:
    """A batch of which at least the forward pass was launched. Used by the engine's thread; `wait` by any thread."""

    def __init__(self, followed: FollowedRows, answers: SlotAnswers, settle: Callable[[], None]) -> None:
        """`settle`: launches the choice of the batch after this one, once this one is read."""
        self._followed = followed
        self._answers = answers
        self._settle = settle
        self._launched = threading.Event()  # completely, or the launch has failed
        self._outputs: StepOutputs | Exception | None = None
        self._token_ids: list[int] | None = None  # None: not read yet

    def finish_launch(self, outputs: StepOutputs | Exception) -> None:
        """Set the outputs of the choice, or why it was not launched."""
        self._outputs = outputs
        self._launched.set()

    @property
    def is_read(self) -> bool:
        return self._token_ids is not None

    def is_done(self) -> bool:
        outputs = self._outputs
        if outputs is None:
            return False
        return isinstance(outputs, Exception) or bool(outputs.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._launched.wait()  # until the engine's thread reads the batch before, or closes the runner
        outputs = self._launched_outputs()
        with torch.cuda.device(outputs.device):  # else a new thread would open a context on the first GPU
            outputs.done.synchronize()  # without a timeout; engine/watchdog.py detects a stuck device

    def read(self) -> list[int]:
        """Wait for the tokens, let the answers accept them, and return them."""
        if self._token_ids is None:
            self.wait()
            token_ids: list[int] = self._launched_outputs().tokens.tolist()
            self._token_ids = token_ids
            self._answers.read(self._followed, token_ids)
        return self._token_ids

    def result(self) -> SampledTokens:
        try:
            self.read()
        finally:
            self._settle()  # the device may wait for it
        outputs = self._launched_outputs()
        sampled = sampled_tokens(outputs.tokens, outputs.logprobs)
        if outputs.scores is not None:
            sampled = replace(sampled, prompt_logprobs=outputs.scores.by_item())
        if self._followed:
            reasons = errors_of(self._followed) if sampled.invalid_rows else {}
            following = self._answers.take_forced(self._followed)
            sampled = replace(sampled, constraint_errors=reasons, following=following)
        return sampled

    def _launched_outputs(self) -> StepOutputs:
        assert self._outputs is not None
        if isinstance(self._outputs, Exception):
            raise self._outputs
        return self._outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoded:
    """The forward pass of a replayed decode step."""

    hidden: Tensor  # [size, hidden_size]
    size: int
    num_sampled: int
    scores: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unfinished:
    """The forward pass of any other step, up to its last attention."""

    unfinished: PartialForward
    inputs: DeviceInputs
    num_sampled: int
    scores: PromptScores | None


_Forward = _Decoded | _Unfinished


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unchosen:
    """A batch that waits with its choice until the batch before is read."""

    before: CudaBatch
    batch: CudaBatch
    choose: Callable[[], StepOutputs]


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
        on_captured: Callable[[int, int], None] | None = None,
    ) -> None:
        """`attention` must be bound to the pool; `table` must have `limits.max_requests` slots. `on_captured` gets the
        numbers of graphs that are captured, and of all."""
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
        self._newest: CudaBatch | None = None
        self._unchosen: _Unchosen | None = None
        self._decodes: StepGraphs[Tensor] | None = None  # to the last hidden state
        self._choices: StepGraphs[None] | None = None  # from there to the staged tokens
        self._mixed: StepGraphs[PartialForward] | None = None
        if use_graphs:
            with torch.inference_mode():
                self._capture(limits, on_captured or (lambda _num_done, _num_all: None))

    def launch(self, batch: Batch) -> LaunchedBatch:
        """Launch a batch; a batch without items only ends and starts requests. Raises if the launch fails; `result`
        raises an error of the execution."""
        self.settle()
        previous, self._previous = self._previous, EMPTY_BATCH
        self._table.update(batch)
        if not batch.items:
            return FinishedBatch(SampledTokens(token_ids=()))
        before, self._newest = self._newest, None
        answers = self._table.answers
        columns = read_batch(batch, previous, self._table)
        rows = sampling_rows(batch.items, self._table) if columns.persistent.wants_logprobs else None
        scored = ScoredRows.of(batch.items, self._table.scoring)
        followed = answers.followed(batch.items)
        launched = CudaBatch(followed, answers, self.settle)
        try:
            answers.accept_known(batch.items)
            with torch.inference_mode():
                computed = self._forward(columns, scored)
            choose = partial(self._choose_step, batch, followed, computed, rows)
            if before is not None and not before.is_read and answers.await_tokens(batch.items):
                self._unchosen = _Unchosen(before=before, batch=launched, choose=choose)
            else:
                launched.finish_launch(choose())
        except BaseException:
            torch.cuda.synchronize()  # queued kernels write pages that the scheduler is about to reuse
            raise
        self._newest = launched
        self._previous = columns.persistent
        return launched

    def settle(self) -> None:
        """See `RankRunner.settle`. An error becomes the error of the newest batch."""
        unchosen, self._unchosen = self._unchosen, None
        if unchosen is None:
            return
        try:
            unchosen.before.read()
            unchosen.batch.finish_launch(unchosen.choose())
        except Exception as error:
            unchosen.batch.finish_launch(error)
            with contextlib.suppress(RuntimeError):  # an error of the device: the batches raise it
                torch.cuda.synchronize()  # as in `launch`

    def close(self) -> None:
        """Drop the graphs and the pool."""
        if self._unchosen is not None:
            self._unchosen.batch.finish_launch(EngineError("the worker is shutting down"))
            self._unchosen = None
        torch.cuda.synchronize()
        self._decodes = self._choices = self._mixed = None
        self.pool.close()

    def _capture(self, limits: StepLimits, on_captured: Callable[[int, int], None]) -> None:
        decodes = self._attention.plan_decode_graph(limits.max_requests, limits.max_pages)
        if decodes is None:
            return
        pool = torch.cuda.graph_pool_handle()
        mixed = self._attention.plan_mixed_graph(limits.max_requests, limits.max_pages, limits.max_tokens)
        of_mixed = [] if mixed is None else mixed_sizes(limits.max_tokens)
        sizes = decode_sizes(limits.max_requests)
        num_all, numbers = len(of_mixed) + 2 * len(sizes), itertools.count(1)

        def captured() -> None:
            on_captured(next(numbers), num_all)

        on_captured(0, num_all)
        if mixed is not None:  # the family with the largest graphs first: the others reuse its memory
            self._mixed = StepGraphs(mixed, partial(self._begin, mixed), pool)
            self._mixed.capture(of_mixed, "steps with prompt chunks", captured)
        self._decodes = StepGraphs(decodes, partial(self._decode, decodes), pool)
        self._decodes.capture(sizes, "decodes", captured)
        self._choices = StepGraphs(None, partial(self._choose_decoded, self._decodes), pool)
        self._choices.capture(sizes, "the choice of their tokens", captured)

    def _begin(self, plan: GraphPlan, size: int) -> PartialForward:
        inputs = self._staging.views(size, 0)
        return self._model.begin_forward(inputs.token_ids(), inputs.positions, plan.attend(size))

    def _decode(self, plan: GraphPlan, size: int) -> Tensor:
        """Return hidden [size, hidden_size]."""
        return self._model.finish_forward(self._begin(plan, size))

    def _choose_decoded(self, decodes: StepGraphs[Tensor], size: int) -> None:
        """Stage the tokens of the decode step of `size` rows."""
        self._choose(self._model.logits(decodes.result(size)), self._staging.views(size, size))

    def _forward(self, columns: BatchColumns, scored: ScoredRows | None) -> _Forward:
        """Launch the forward pass of a step, and the scores of its prompts."""
        host, spans = columns.inputs, columns.spans
        num_tokens, num_sampled = len(host.token_ids), len(host.rows)
        if columns.only_decodes and self._decodes and (size := self._decodes.size_for(num_tokens)):
            assert scored is None, "a row that samples its token scores none: the next token is not known"
            self._staging.send(host, size, size)
            return _Decoded(hidden=self._decodes.replay(size, spans), size=size, num_sampled=num_sampled)
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
        return _Unfinished(unfinished=unfinished, inputs=inputs, num_sampled=num_sampled, scores=scores)

    def _choose_step(
        self, batch: Batch, followed: FollowedRows, computed: _Forward, rows: Sequence[SamplingRow] | None
    ) -> StepOutputs:
        """Launch the choice of a step's tokens, and their way to the host. `rows` None: no row needs logprobs."""
        with torch.inference_mode():
            self._table.shaping.before_choice(batch.items, followed)
            logits = self._choose_and_stage(computed, with_logits=rows is not None)
            logprobs = None if rows is None or logits is None else self._logprobs(logits, rows)
            tokens = self._staging.start_read(computed.num_sampled)
            outputs = StepOutputs(
                tokens=tokens,
                logprobs=None if logprobs is None else logprobs.start_copy(),
                scores=None if computed.scores is None else computed.scores.start_copy(),
                done=torch.cuda.Event(),  # type: ignore[no-untyped-call]
                device=self.pool.tensor.device,
            )
        outputs.done.record()
        return outputs

    def _choose_and_stage(self, computed: _Forward, *, with_logits: bool) -> Tensor | None:
        """Choose and stage the tokens. Return the logits before they were shaped, if they are needed."""
        if isinstance(computed, _Decoded):
            assert self._choices is not None
            self._choices.replay(computed.size, ())
            return self._model.logits(computed.hidden[: computed.num_sampled]) if with_logits else None
        if not computed.num_sampled:
            return None
        logits = self._model.logits(self._model.finish_forward(computed.unfinished.select(computed.inputs.rows)))
        self._choose(logits.clone() if with_logits else logits, computed.inputs)
        return logits

    def _choose(self, logits: Tensor, inputs: DeviceInputs) -> None:
        """Choose a token for each row and stage the tokens. Changes `logits`."""
        shaped = ShapedRows(tables=self._table.shaping.tables, slots=inputs.slots, flags=inputs.flags)
        self._staging.write_sampled(choose_tokens(logits, inputs.columns, shaped), inputs.slots)

    def _logprobs(self, logits: Tensor, rows: Sequence[SamplingRow]) -> LogprobTensors | None:
        return compute_logprobs(logits, rows, self._staging.sampled(len(rows)).long())
