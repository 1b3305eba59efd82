"""Applies the report of a step: appends and sends the sampled tokens, inserts full pages into the cache, ends requests.

With overlap a step may be pending for a request that has ended (endings.py): the tokens of its rows are dropped. A row
may have tokens that the row before had already (`SampledTokens.following`): they are dropped, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvist import errors
from kvist.kv.cache import PageCache
from kvist.plan.events import SampledTokens, StepFailed, StepFinished
from kvist.request import Outcome, SampledToken
from kvist.scheduler.active import ActiveRequest, PrefillRequest, RequestState, StoringRequest
from kvist.scheduler.chunks import send_first_token, send_prompt_logprobs, send_tokens
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.endings import Endings
from kvist.scheduler.handoff.sides import Handoffs
from kvist.scheduler.leases import Leases
from kvist.scheduler.pending import PendingStep, PendingSteps
from kvist.scheduler.stage_times import note_chunk
from kvist.scheduler.states import Requests
from kvist.wire import TokenChunk

_DAMAGED = "the weights or the device are damaged: check the model's files"
_INVALID_LOGITS = f"no token can be chosen: the model's output is not a number (NaN or infinity). Probably {_DAMAGED}"
_NO_TOKEN_LEFT = (
    "`allowed_token_ids`, `bad_words` and the constraint of the answer together leave no token: omit one of them. If "
    f"requests without these fields fail, too, {_DAMAGED}"
)


class Results:
    """Mutable; its one owner is the scheduler."""

    def __init__(
        self,
        context: SchedulerContext,
        requests: Requests,
        cache: PageCache,
        pending: PendingSteps,
        endings: Endings,
        handoffs: Handoffs,
        leases: Leases,
    ) -> None:
        self._context = context
        self._requests = requests
        self._cache = cache
        self._pending = pending
        self._endings = endings
        self._handoffs = handoffs
        self._leases = leases
        self._step_planned_s = 0.0  # of the step whose results are being applied
        self._last_finished_s = 0.0

    def on_step_finished(self, event: StepFinished) -> None:
        step = self._pending.pop(event.step_id)
        self._context.count("steps")
        self._measure(step)
        self._apply(step, event.sampled)

    def _measure(self, step: PendingStep) -> None:
        """Count the duration of a step: with overlap, from the end of the step before."""
        context = self._context
        duration_s = context.now_s - max(step.planned_s, self._last_finished_s)
        self._last_finished_s = context.now_s
        if step.num_prompt_tokens:
            context.count("prompt_step_tokens", step.num_prompt_tokens)
            context.count("prompt_step_seconds", duration_s)
            if step.is_full:
                context.prompt_rate.add(step.num_prompt_tokens, duration_s)
        else:
            context.count("decode_steps")
            context.count("decode_step_seconds", duration_s)

    def on_step_failed(self, event: StepFailed) -> None:
        for request in self._pending.pop(event.step_id).requests():
            if request.state is RequestState.ENDED:
                self._endings.release(request)
            else:
                self._handoffs.end(request, Outcome.FAILED, errors.StepFailed.code, event.message)

    def _apply(self, step: PendingStep, sampled: SampledTokens) -> None:
        """Apply a finished step: its K/V is in the pages."""
        self._step_planned_s = step.planned_s
        chunks = self._context.out.chunks
        num_chunks_before, num_tokenless_before = len(chunks), self._context.out.num_tokenless_chunks
        if sampled.invalid_rows:
            self._fail_invalid_rows(step, sampled)
        assert len(sampled) == len(step.decodes) + sum(samples for *_, samples in step.chunks)
        self._apply_decodes(step.decodes, sampled)
        scores, rows = sampled.prompt_logprobs, sampled.rows(len(step.decodes))
        for item, (request, end, samples) in enumerate(step.chunks, len(step.decodes)):
            tokens = next(rows) if samples else ()
            if request.state is RequestState.ENDED:
                self._endings.release(request)
            else:
                if item in scores:
                    send_prompt_logprobs(self._context, request, scores[item])
                self._apply_chunk(request, end, tokens)
        sent = chunks[num_chunks_before:]
        num_tokenless = self._context.out.num_tokenless_chunks - num_tokenless_before
        num_sent = sum(len(chunk.token_ids) for chunk in sent) if sampled.following else len(sent) - num_tokenless
        self._context.count("generation_tokens", num_sent)

    def _fail_invalid_rows(self, step: PendingStep, sampled: SampledTokens) -> None:
        """Fail the requests of these rows; the other rows of the step are valid. Pages that the step wrote for the
        failed requests are not inserted into the tree."""
        sampled_requests = [*step.decodes, *(request for request, _, samples in step.chunks if samples)]
        for row in sorted(sampled.invalid_rows):
            if sampled_requests[row].state is not RequestState.ENDED:
                code, message = errors.EngineError.code, _INVALID_LOGITS
                if sampled_requests[row].sampling.may_exclude_all:
                    code, message = errors.RequestError.code, _NO_TOKEN_LEFT
                if (reason := sampled.constraint_errors.get(row)) is not None:
                    code, message = errors.InvalidConstraint.code, reason
                self._handoffs.end(sampled_requests[row], Outcome.FAILED, code, message)

    def _apply_decodes(self, decodes: list[ActiveRequest], sampled: SampledTokens) -> None:
        """Apply the rows of decodes. A hot loop: it runs for every stream in every step. `_append` handles rare
        cases."""
        page_size, ended, chunks = self._cache.page_size, RequestState.ENDED, self._context.out.chunks
        logprobs, following = sampled.logprobs, sampled.following
        for row, request, token_id in zip(range(len(decodes)), decodes, sampled.token_ids, strict=False):
            if request.state is ended:
                self._endings.release(request)
                continue
            token_ids = request.token_ids
            request.num_computed = end = request.num_computed + 1
            if not end % page_size:
                self._cache.insert(request.lease, token_ids, request.num_kept_tokens(end))
            position = end - request.num_prompt
            if (
                position
                and end == len(token_ids)
                and end + 1 < request.max_len
                and token_id not in request.stop_ids
                and not request.stages.has_news  # nor a handoff's report, which comes with news
                and not (logprobs and row in logprobs)
                and not (following and row in following)
            ):
                token_ids.append(token_id)
                chunks.append(TokenChunk(request_id=request.request_id, position=position, token_ids=(token_id,)))
            else:
                self._append(request, end, sampled.row(row))

    def _apply_chunk(self, request: ActiveRequest, end: int, tokens: Sequence[SampledToken]) -> None:
        note_chunk(request, request.num_computed, end, self._context.now_s)
        request.num_computed = end
        self._cache.insert(request.lease, request.token_ids, request.num_kept_tokens(end))
        is_whole = end == len(request.token_ids)
        if isinstance(request, PrefillRequest):
            if is_whole:
                self._complete_prefill(request, tokens)
            self._handoffs.on_computed(request)
        elif isinstance(request, StoringRequest):
            self._handoffs.stored.on_computed(request)
            if is_whole:
                self._complete_storing(request, tokens[0])
        elif tokens:
            self._append(request, end, tokens)

    def _append(self, request: ActiveRequest, end: int, tokens: Sequence[SampledToken]) -> None:
        """Append and send the tokens of a row, the first of which is the token at `end`: those that are not known
        yet, up to the token that ends the answer."""
        tokens = tokens[len(request.token_ids) - end :]
        if not tokens:
            return
        position, finish, num_kept = len(request.token_ids) - request.num_prompt, None, 0
        while finish is None and num_kept < len(tokens):
            request.token_ids.append(tokens[num_kept].token_id)
            finish = request.finish_reason(tokens[num_kept].token_id, len(request.token_ids))
            num_kept += 1
        if request.handoff_report is not None:
            self._handoffs.on_second_token(request, self._step_planned_s)
        lease = self._leases.on_computed(request) if finish is not None else None
        if isinstance(lease, tuple):
            self._handoffs.end(request, Outcome.FAILED, *lease)
            return
        send_tokens(self._context, request, position, tokens[:num_kept], finish, lease)
        if finish is not None:
            self._handoffs.end(request, Outcome.FINISHED)

    def _complete_storing(self, request: StoringRequest, token: SampledToken) -> None:
        num_tokens = len(request.token_ids)
        finish = request.finish_reason(token.token_id, num_tokens + 1)
        send_tokens(self._context, request, num_tokens - request.num_prompt, (token,), finish)
        if finish is not None:
            self._handoffs.end(request, Outcome.FINISHED)
        else:
            self._handoffs.stored.on_first_token(request)

    def _complete_prefill(self, request: PrefillRequest, tokens: Sequence[SampledToken]) -> None:
        if request.first_token is None:  # else its pages were computed again after a preemption
            request.first_token_s = self._context.now_s
            request.first_token = token = tokens[0]  # decode samples the tokens after the first one
            request.first_token_finish = request.finish_reason(token.token_id, len(request.token_ids) + 1)
        self._requests.move(request, RequestState.AWAITING_TRANSFER)
        send_first_token(self._context, request)
