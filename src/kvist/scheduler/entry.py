"""The rules for new requests: which requests are refused at once, and which request is displaced from a full queue.

If a request in a full queue has a higher `priority` value than the new one, it is dropped. Otherwise the newest waiting
request of the caller with the most requests there is dropped, in favour of a caller with at least two fewer
(unadmitted.py). A request that was ever admitted is not displaced: its client may have received a token.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TypedDict

from kvist.errors import Unavailable
from kvist.fairness import CallerPath
from kvist.fit import limit_text, num_tokens_needed, num_tokens_to_compute
from kvist.kv.cache import PageCache
from kvist.request import BACKGROUND_PRIORITY, PRIORITY, EngineRequest, Mode, Role, SamplingParams
from kvist.scheduler.active import ActiveRequest, DecodeRequest, PrefillRequest, RequestState, StoringRequest
from kvist.scheduler.config import SchedulerConfig
from kvist.wire import Submit

Refusal = tuple[str, str]  # error code, message

_WITHOUT_PAGES = (
    RequestState.COMPILING,
    RequestState.WAITING,
    RequestState.FETCHING,
    RequestState.AWAITING_PAGES,
)

_WRONG_MODE = {
    Role.UNIFIED: "does not take over pages. Send decode requests to a decode worker",
    Role.PREFILL: "does not take over pages. Send decode requests to a decode worker",
    Role.DECODE: "computes no prompts for other workers. Send the request to the router",
}


class _CommonFields(TypedDict):
    number: int
    priority: int
    request: EngineRequest
    arrived_s: float
    num_uncomputed: int
    eos_token_ids: tuple[int, ...]


def find_refusal(
    event: Submit,
    cache: PageCache,
    *,
    context_len: int,
    role: Role,
    modes: Container[Mode],
    eos_token_ids: Sequence[int],
) -> Refusal | None:
    """Return why the request can never run here; None if it can. `context_len`: the most tokens of one request."""
    request = event.request
    if event.mode not in modes:  # retryable: the gateway may not know yet that the role was switched
        return Unavailable.code, f"this worker has the role {role}: it {_WRONG_MODE[role]}"
    if not request.prompt_token_ids:
        return "invalid_request", "the prompt is empty"
    if request.output_token_ids and len(request.output_token_ids) >= request.sampling.max_tokens:
        return "invalid_request", "nothing is left to generate: output_token_ids has max_tokens tokens already"
    if _allows_no_token(request.sampling, eos_token_ids):
        reason = "each of them ends the answer, and `min_tokens` excludes them at first"
        return "invalid_request", f"`allowed_token_ids` leaves no token: {reason}. Lower `min_tokens`"
    num_tokens = num_tokens_needed(request, event.mode)
    if num_tokens > context_len:
        limit = limit_text(context_len, cache.num_pages, cache.page_size)
        return "context_length_exceeded", f"the request needs {num_tokens} tokens; this worker holds {limit}"
    return None


def _allows_no_token(sampling: SamplingParams, eos_token_ids: Sequence[int]) -> bool:
    """Return whether no allowed token may be the first. The gateway checks other contradictions; it does not know the
    end-of-sequence tokens."""
    if not sampling.allowed_token_ids or not sampling.min_tokens:
        return False
    ending = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    return ending.issuperset(sampling.allowed_token_ids)


def make_request(event: Submit, config: SchedulerConfig, *, number: int, now_s: float) -> ActiveRequest | Refusal:
    """Return the request, in the class of its mode, or the refusal of a message that lacks a field of that mode."""
    priority = event.request.priority if config.scheduling_policy == PRIORITY else 0
    common = _CommonFields(
        number=number,
        priority=BACKGROUND_PRIORITY if event.request.background else priority,
        request=event.request,
        arrived_s=now_s,
        num_uncomputed=num_tokens_to_compute(event.request, event.mode, event.num_uncomputed_tokens),
        eos_token_ids=config.eos_token_ids,
    )
    if event.mode is Mode.FULL:
        return ActiveRequest(**common, from_store=event.handoff == "store")
    if event.mode is Mode.PREFILL and event.handoff == "store":
        return StoringRequest(**common)
    if event.handoff_id is None:
        return "invalid_request", f"a {event.mode.value} request needs a handoff_id"
    if event.mode is Mode.PREFILL:
        if event.target_epoch is None:
            return "invalid_request", "a prefill request must name its decode worker"
        return PrefillRequest(**common, handoff_id=event.handoff_id, target_epoch=event.target_epoch)
    if event.prefill is None:
        return "invalid_request", "a decode request must name its prefill worker"
    return DecodeRequest(**common, handoff_id=event.handoff_id, prefill=event.prefill)


def newest_waiting(priority: int, caller: CallerPath, newest_first: Iterable[ActiveRequest]) -> ActiveRequest | None:
    """Return the caller's newest request of this priority that was never admitted and holds no page."""
    return next(
        (
            request
            for request in newest_first
            if request.caller == caller
            and request.priority == priority
            and request.state in _WITHOUT_PAGES
            and not request.was_admitted
        ),
        None,
    )
