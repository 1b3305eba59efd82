"""One request inside a scheduler: a type for each mode, the states, and the allowed transitions.

    WAITING ──► RUNNING ──► ENDED                       FULL: a chunk or a token per step; preempted: back to WAITING
    WAITING ──► RUNNING ──► AWAITING_TRANSFER ──► ENDED PREFILL: computed; keeps its pages until the handoff closes
                   └──────────────┴──► SUSPENDED ──► WAITING    preempted before its Grant; WAITING again with the Grant
    WAITING ──► RUNNING ──► AWAITING_TRANSFER ──► ENDED PREFILL through the store: keeps its pages until they are stored
    WAITING ──► GRANTED ──► RUNNING ──► ENDED           DECODE: the prefill worker fills its pages
    WAITING ──► LOADING ──► RUNNING | GRANTED           its first pages are copied from the host tier
    WAITING ──► AWAITING_PAGES ──► WAITING              another request loads or computes its next pages
    FETCHING ──► WAITING                                before the queue: pages are fetched from the storage tier
    COMPILING ──► FETCHING | WAITING                    before both: the constraint of the answer is compiled

Every other state may change to ENDED. Each state has one container (states.py). This file makes no decisions.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import ClassVar

from kvist.fairness import CallerPath, caller_path
from kvist.flight.handoff_report import HandoffReport
from kvist.flight.stages import StageClock
from kvist.kv.lease import PageLease
from kvist.kv.tiers.prefetch import Prefetch
from kvist.kv.tiers.storage import PrefixStoring
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
from kvist.wire import PrefillPeer


class RequestState(enum.Enum):
    COMPILING = "compiling"  # without pages: waits for the grammar of its constraint; pages are fetched meanwhile
    FETCHING = "fetching"  # without pages: waits for pages from the store
    WAITING = "waiting"  # in the queue, without pages
    AWAITING_PAGES = "awaiting_pages"  # without pages: another request loads or computes its next pages
    SUSPENDED = "suspended"  # PREFILL without a Grant, preempted: waits for the Grant
    GRANTED = "granted"  # DECODE: its pages are granted to the prefill worker
    LOADING = "loading"  # has pages; the mover copies host pages into the first of them
    RUNNING = "running"  # has pages; takes part in steps
    AWAITING_TRANSFER = "awaiting_transfer"  # PREFILL: computed; keeps its pages for the handoff, or until stored
    ENDED = "ended"  # `Ended` was sent; its pages stay while a step, a load or a peer still uses them


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.COMPILING: frozenset({RequestState.FETCHING, RequestState.WAITING, RequestState.ENDED}),
    RequestState.FETCHING: frozenset({RequestState.WAITING, RequestState.ENDED}),
    RequestState.WAITING: frozenset(
        {
            RequestState.AWAITING_PAGES,
            RequestState.LOADING,
            RequestState.RUNNING,
            RequestState.GRANTED,
            RequestState.ENDED,
        }
    ),
    RequestState.AWAITING_PAGES: frozenset({RequestState.WAITING, RequestState.ENDED}),
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
    """A request of mode FULL, and the base of the requests of other modes. Mutable; its one owner is the scheduler.

    Only `Requests` sets `state` and `admitted_s`."""

    mode: ClassVar[Mode] = Mode.FULL

    number: int  # in order of arrival: the request with the greatest number is the youngest
    # A lower value is served first. With the scheduling policy "fcfs" 0, and more for requests in the background.
    priority: int = 0
    request: EngineRequest
    arrived_s: float
    num_uncomputed: int  # tokens that this engine has to compute for it, as expected on its arrival
    eos_token_ids: InitVar[tuple[int, ...]]
    from_store: bool = False  # a prefill engine has stored the pages of its prompt
    state: RequestState = RequestState.WAITING
    num_computed: int = 0  # K/V of [0, num_computed) is in the pages
    # K/V of [0, num_planned) will be in the pages once the pending steps are finished. If [0, num_planned) is all of
    # `token_ids`, the newest pending step also samples the next token.
    num_planned: int = 0
    num_replayed: int = 0  # tokens that it had when it began to run: the tokens after them were sampled by its steps
    last_step_id: int = 0  # the newest step that writes the pages of this request
    prefetch: Prefetch | None = None  # open until the request is admitted or ends
    num_cached_tokens: int | None = None  # prompt tokens found in the cache when it was first admitted
    num_cached_host_tokens: int = 0  # part of num_cached_tokens: loaded from the host tier
    num_cached_storage_tokens: int = 0  # part of num_cached_tokens: fetched from the storage tier
    loading: bool = False  # the mover may access its pages, even after the request has ended
    ticket: int = 0  # number of its latest push into the queue
    admitted_s: float | None = None  # time of its first admission
    taken_over_s: float = 0.0  # when `handoff_report` was made
    lost_place: bool = False  # to a claimant (victims.py)
    kept_until: int = 0  # below this number of tokens no claimant gets its place
    handoff_report: HandoffReport | None = None  # sent with the next chunk; set when decode has the pages
    token_ids: list[int] = field(init=False)  # prompt and output tokens; without the first token of a PREFILL
    page_ids: Sequence[int] = field(init=False, default=())  # of the lease
    slot: SlotId = field(init=False)  # at the runner; unset in every state but RUNNING (slots.py)
    urgency: tuple[int, int] = field(init=False)  # priority and number: lower is served first, and preempted last
    stages: StageClock = field(init=False)  # where its time goes (stage_times.py)
    request_id: RequestId = field(init=False)
    caller: CallerPath = field(init=False)
    num_prompt: int = field(init=False)
    sampling: SamplingParams = field(init=False)
    max_len: int = field(init=False)  # the answer ends with LENGTH at this number of tokens; see `emits_tokens`
    next_scored: int = field(init=False)  # first prompt position still to be scored; num_prompt: none is left
    stop_ids: frozenset[int] = field(init=False)
    suppressed_ids: tuple[int, ...] = field(init=False)
    suppress_until: int = field(init=False)  # stop tokens are suppressed below this number of tokens
    _lease: PageLease | None = field(init=False, default=None)

    def __post_init__(self, eos_token_ids: tuple[int, ...]) -> None:
        request, sampling = self.request, self.request.sampling
        self.urgency = self.priority, self.number
        self.stages = StageClock(self.arrived_s)
        self.request_id, self.sampling = request.request_id, sampling
        self.caller = caller_path(request.client)
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.max_len = self.num_prompt + max(1, sampling.max_tokens)
        # an engine that continues an answer, or takes over pages, follows an engine that has scored the whole prompt
        scores = sampling.prompt_logprobs is not None and self.mode is not Mode.DECODE and not request.output_token_ids
        self.next_scored = min(max(1, sampling.prompt_logprobs_start), self.num_prompt) if scores else self.num_prompt
        self.stop_ids = frozenset(() if sampling.ignore_eos else eos_token_ids) | frozenset(sampling.stop_token_ids)
        self.suppressed_ids = tuple(sorted(self.stop_ids))
        self.suppress_until = self.num_prompt + sampling.min_tokens

    # ---------------------------------------------------------------- pages

    @property
    def lease(self) -> PageLease:
        """The lease of a request that has pages."""
        assert self._lease is not None, f"{self.request_id} has no pages"
        return self._lease

    @property
    def has_pages(self) -> bool:
        return self._lease is not None

    def set_lease(self, lease: PageLease) -> None:
        self._lease, self.page_ids = lease, lease.page_ids

    def take_lease(self) -> PageLease:
        """Remove the lease from the request and return it, to be closed."""
        lease = self.lease
        self._lease, self.page_ids = None, ()
        return lease

    @property
    def has_accessed_pages(self) -> bool:
        """Whether the mover, the transport or a peer may access its pages."""
        return self.loading

    # ---------------------------------------------------------------- differences between the modes

    @property
    def ungranted(self) -> bool:
        """Whether this is a PREFILL without a Grant: it computes only in pages that no other request needs."""
        return False

    @property
    def awaits_handoff(self) -> bool:
        """Whether this is a DECODE that has granted no pages yet: a prefill engine will compute its prompt."""
        return False

    @property
    def has_first_token(self) -> bool:
        """Whether this is a PREFILL whose first token was sampled: after a preemption only its K/V is computed
        again."""
        return False

    # ---------------------------------------------------------------- tokens

    @property
    def was_admitted(self) -> bool:
        return self.admitted_s is not None

    @property
    def num_tokens_on_arrival(self) -> int:
        """Tokens of the request on arrival: a handoff moves the K/V of [0, num_tokens_on_arrival)."""
        return len(self.request.prompt_token_ids) + len(self.request.output_token_ids)

    @property
    def max_cached_tokens(self) -> int:
        """The most tokens whose K/V may come from the cache. A request that is computed here computes at least its last
        token, and all tokens from the one before the next scored token on."""
        if self.awaits_handoff:
            return len(self.token_ids)
        return self.next_scored - 1 if self.scores_prompt else len(self.token_ids) - 1

    def num_kept_tokens(self, end: int) -> int:
        """Return how many of the tokens [0, end) stay cached: those that no other request will have do not."""
        return min(end, self.request.num_shared_tokens or end)

    @property
    def scores_prompt(self) -> bool:
        """Whether logprobs of the prompt are still to be reported."""
        return self.next_scored < self.num_prompt

    @property
    def emits_tokens(self) -> bool:
        """Whether sampled tokens are sent. With `max_tokens` 0 the one token sampled after the prompt is dropped."""
        return self.sampling.max_tokens > 0

    def finish_reason(self, token_id: int, num_tokens: int) -> FinishReason | None:
        """Return why `token_id`, as the last of `num_tokens` tokens, ends the answer; None if it does not. A constraint
        that allows nothing but the end overrides `min_tokens`."""
        may_end = num_tokens > self.suppress_until or self.sampling.constraint is not None
        if token_id in self.stop_ids and self.emits_tokens and may_end:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.max_len else None


@dataclass(slots=True, eq=False, kw_only=True)
class PrefillRequest(ActiveRequest):
    """A request of mode PREFILL: its prompt is computed here for a decode engine."""

    mode: ClassVar[Mode] = Mode.PREFILL

    handoff_id: HandoffId
    target_epoch: EpochId  # the engine that may grant pages
    granted: bool = False  # the Grant has arrived: from then on the request is not preempted
    in_handoff: bool = False  # the transport may read its pages
    first_token: SampledToken | None = None  # sent to the gateway when it is known and the Grant has arrived
    first_token_s: float = 0.0  # when it was known
    first_token_sent: bool = False
    first_token_finish: FinishReason | None = None

    @property
    def has_accessed_pages(self) -> bool:
        return self.in_handoff or self.loading

    @property
    def ungranted(self) -> bool:
        return not self.granted

    @property
    def has_first_token(self) -> bool:
        return self.first_token is not None


@dataclass(slots=True, eq=False, kw_only=True)
class StoringRequest(ActiveRequest):
    """A request of mode PREFILL through the store: its prompt is computed here, and its pages are stored."""

    mode: ClassVar[Mode] = Mode.PREFILL

    storing: PrefixStoring | None = None  # from its first full page on; None without a store
    computed_s: float = 0.0  # when its first token was sampled


@dataclass(slots=True, eq=False, kw_only=True)
class DecodeRequest(ActiveRequest):
    """A request of mode DECODE: a prefill engine computes its prompt; the answer is generated here."""

    mode: ClassVar[Mode] = Mode.DECODE

    handoff_id: HandoffId
    prefill: PrefillPeer  # the engine that may be granted pages
    granted: bool = False  # its pages were granted to the prefill engine; stays set after the handoff
    in_handoff: bool = False  # the prefill engine may write its pages

    @property
    def has_accessed_pages(self) -> bool:
        return self.in_handoff or self.loading

    @property
    def awaits_handoff(self) -> bool:
        return not self.granted
