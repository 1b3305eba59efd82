"""Makes the chunks for the gateways: output tokens, and logprobs of prompts."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.lease_messages import LeaseStatus
from kvist.request import FinishReason, Mode, SampledToken, TokenLogprobs
from kvist.scheduler.active import ActiveRequest, PrefillRequest
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.stage_times import sent_stages
from kvist.wire import TokenChunk


def send_first_token(context: SchedulerContext, request: PrefillRequest) -> None:
    """Send the first token of a PREFILL if it is known and decode has granted pages: a stream that has begun must not
    wait in a queue."""
    if request.granted and request.first_token is not None and not request.first_token_sent:
        request.first_token_sent = True
        position = len(request.token_ids) - request.num_prompt
        send_tokens(context, request, position, (request.first_token,), request.first_token_finish)


def send_prompt_logprobs(context: SchedulerContext, request: ActiveRequest, found: tuple[TokenLogprobs, ...]) -> None:
    """Send the logprobs of the next scored tokens of the prompt."""
    chunk = TokenChunk(
        request_id=request.request_id,
        position=len(request.token_ids) - request.num_prompt,
        token_ids=(),
        prompt_logprobs=found,
        prompt_position=request.next_scored,
    )
    request.next_scored += len(found)
    context.out.num_tokenless_chunks += 1
    context.out.chunks.append(chunk)


def send_tokens(
    context: SchedulerContext,
    request: ActiveRequest,
    position: int,
    tokens: Sequence[SampledToken],
    finish: FinishReason | None,
    lease: LeaseStatus | None = None,
) -> None:
    if not request.emits_tokens:
        tokens = ()
        context.out.num_tokenless_chunks += 1
    reports_cached = position == 0 and request.mode is not Mode.DECODE  # decode did not compute the prompt
    by_tier = (request.num_cached_host_tokens, request.num_cached_storage_tokens) if reports_cached else (0, 0)
    chunk = TokenChunk(
        request_id=request.request_id,
        position=position,
        token_ids=tuple(token.token_id for token in tokens),
        logprobs=tuple(token.logprobs for token in tokens if token.logprobs is not None) or None,
        finish_reason=finish,
        num_cached_tokens=request.num_cached_tokens if reports_cached else None,
        num_cached_host_tokens=by_tier[0],
        num_cached_storage_tokens=by_tier[1],
        handoff=request.handoff_report,
        lease=lease,
        stages=sent_stages(request, context.now_s),
    )
    request.handoff_report = None
    context.out.chunks.append(chunk)
