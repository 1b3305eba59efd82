"""One request inside a scheduler: its state, its tokens and its pages.

    WAITING ──► RUNNING ──► ENDED                       FULL: a chunk or a token a step; preempted: back to WAITING
    WAITING ──► RUNNING ──► AWAITING_TRANSFER ──► ENDED PREFILL: computed; keeps its pages until the handoff closes
                   └──────────────┴──► SUSPENDED ──► WAITING    preempted before its Grant; WAITING again with the Grant
    WAITING ──► GRANTED ──► RUNNING ──► ENDED           DECODE: the prefill worker fills its pages
    WAITING ──► LOADING ──► RUNNING | GRANTED           some of its pages are copied from the host tier first
    WAITING ──► FETCHING ──► WAITING                    before admission: some pages are fetched from the storage tier

Each state may change to ENDED. This file lists the allowed transitions; it makes no decisions.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvist.fairness import CallerPath, caller_path
from kvist.kv.lease import PageLease
from kvist.kv.tiers.prefetch import Prefetch
from kvist.request import (
    EngineRequest,
    EpochId,
    FinishReason,
    HandoffId,
    Mode,
    RequestId,
    SampledToken,
    SamplingParams,
    SlotId,
)
from kvist.wire import HandoffReport, PrefillPeer


class RequestState(enum.Enum):
    WAITING = "waiting"  # in the queue, without pages
    FETCHING = "fetching"  # out of the queue, without pages: waits for a prefetch, or for another request's load
    SUSPENDED = "parked"  # PREFILL without a Grant, preempted: out of the queue until the Grant arrives
    GRANTED = "granted"  # DECODE: its pages are granted to the prefill worker
    LOADING = "loading"  # has pages; the mover copies host pages into the first of them
    RUNNING = "running"  # has pages; takes part in steps
    AWAITING_TRANSFER = "awaiting_transfer"  # PREFILL: computed; keeps its pages for the handoff
    ENDED = "ended"  # `Ended` was sent; its pages stay while a step or a peer still uses them


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING: frozenset(
        {
            RequestState.FETCHING,
            RequestState.LOADING,
            RequestState.RUNNING,
            RequestState.GRANTED,
            RequestState.ENDED,
        }
    ),
    RequestState.FETCHING: frozenset({RequestState.WAITING, RequestState.ENDED}),
    RequestState.SUSPENDED: frozenset({RequestState.WAITING, RequestState.ENDED}),
    RequestState.GRANTED: frozenset({RequestState.RUNNING, RequestState.ENDED}),
    RequestState.LOADING: frozenset({RequestState.RUNNING, RequestState.GRANTED, RequestState.ENDED}),
    RequestState.RUNNING: frozenset(
        {RequestState.WAITING, RequestState.SUSPENDED, RequestState.AWAITING_TRANSFER, RequestState.ENDED}
    ),
    RequestState.AWAITING_TRANSFER: frozenset({RequestState.SUSPENDED, RequestState.ENDED}),
    RequestState.ENDED: frozenset(),
}


@dataclass(slots=True, eq=False, kw_only=True)
class ActiveRequest:
    """One request inside a scheduler. Mutable; its one owner is the `RequestTable`.

    The `HandoffSide` sets `granted`, `in_handoff` and `report`."""

    number: int  # arrival order: the greatest is the youngest
    request: EngineRequest
    mode: Mode
    handoff_id: HandoffId | None
    prefill: PrefillPeer | None  # DECODE: the engine that may be granted pages
    target_epoch: EpochId | None  # PREFILL: the engine that may grant pages
    arrived_s: float
    token_ids: list[int]  # prompt and output tokens; without the first token of a PREFILL (`first_token`)
    num_handoff_tokens: int  # tokens of the request on arrival: a handoff moves the K/V of [0, num_handoff_tokens)
    max_len: int  # the answer ends with LENGTH at this number of tokens, prompt included
    stop_ids: frozenset[int]
    needs_known_token: bool = False  # it is in no batch while its last token is pending
    state: RequestState = RequestState.WAITING
    lease: PageLease | None = None
    slot: SlotId | None = None  # its place at the runner, while it is RUNNING
    prefetch: Prefetch | None = None  # open until the request is admitted or ends
    num_computed: int = 0  # K/V of [0, num_computed) is in the pages
    # K/V of [0, num_planned) will be in the pages once the pending steps are finished. If [0, num_planned) is all of
    # `token_ids`, the newest pending step also samples the next token.
    num_planned: int = 0
    last_step_id: int = 0  # the newest step that writes the pages of this request
    num_cached_tokens: int | None = None  # prompt tokens found in the cache when it was first admitted
    num_cached_host_tokens: int = 0  # part of num_cached_tokens: loaded from the host tier
    num_cached_storage_tokens: int = 0  # part of num_cached_tokens: fetched from the storage tier
    loading: bool = False  # the mover may access its pages, even after the request has ended
    in_handoff: bool = False  # a peer or the transport may access its pages
    granted: bool = False  # PREFILL: the Grant has arrived, so the request is no longer preempted
    ticket: int = 0  # number of its latest push into the queue
    admitted_s: float | None = None  # time of its first admission
    first_token: SampledToken | None = None  # PREFILL; sent to the gateway when it is known and the Grant has arrived
    first_token_sent: bool = False
    first_token_finish: FinishReason | None = None
    report: HandoffReport | None = None  # DECODE: sent with the first chunk
    request_id: RequestId = field(init=False)
    caller: CallerPath = field(init=False)
    num_prompt: int = field(init=False)
    sampling: SamplingParams = field(init=False)
    suppressed_ids: tuple[int, ...] = field(init=False)
    suppress_until: int = field(init=False)  # stop tokens are suppressed below this number of tokens

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.caller = caller_path(self.request.client)
        self.sampling = self.request.sampling
        self.num_prompt = len(self.request.prompt_token_ids)
        self.suppressed_ids = tuple(sorted(self.stop_ids))
        self.suppress_until = self.num_prompt + self.sampling.min_tokens

    def move(self, to: RequestState) -> None:
        assert to in TRANSITIONS[self.state], f"{self.request_id}: no transition from {self.state.name} to {to.name}"
        self.state = to

    @property
    def ungranted(self) -> bool:
        """Whether this is a PREFILL without a Grant: it computes only in pages that no other request needs."""
        return self.mode is Mode.PREFILL and not self.granted

    @property
    def was_admitted(self) -> bool:
        return self.admitted_s is not None

    @property
    def awaits_grant_of_pages(self) -> bool:
        """Whether this is a DECODE that has granted no pages yet. Afterwards it is treated like any other request."""
        return self.mode is Mode.DECODE and not self.granted

    @property
    def max_cached_tokens(self) -> int:
        """Most tokens whose K/V may be cached: a request that is computed here computes at least its last token."""
        return len(self.token_ids) if self.awaits_grant_of_pages else len(self.token_ids) - 1

    @property
    def next_position(self) -> int:
        """Position of the next output token: the number of output tokens so far."""
        return len(self.token_ids) - self.num_prompt

    def finish_reason(self, token_id: int, num_tokens: int) -> FinishReason | None:
        """Return why `token_id`, as the last of `num_tokens` tokens, ends the answer; None if it does not."""
        if token_id in self.stop_ids and num_tokens > self.suppress_until:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.max_len else None
