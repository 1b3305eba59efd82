"""PURE interface of a routing policy: chooses a path through the fleet for a request. The policies are in
router/policies/.

A policy gets `WorkerView`s of the workers that can serve the request now, never of lost or full ones. Equal views in an
equal order of calls give equal choices.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvist.page_index.page_runs import NOTHING_HELD, HeldPages
from kvist.request import Role, WorkerId
from kvist.router.rates import Rates


class Reason(enum.Enum):
    """Why a request takes one worker or two."""

    UNIFIED = "unified"  # a unified worker serves it
    SPLIT = "split"  # a prefill and a decode worker
    HELD = "held"  # decode alone: it holds nearly the whole prompt
    PREFILL_QUEUE = "prefill_queue"  # decode alone: a pair would be cheaper without the queue at its prefill worker
    CHEAPER = "cheaper"  # decode alone: a pair would cost more even without a queue
    NO_PREFILL = "no_prefill"  # decode alone: no prefill worker can take the request
    NO_DECODE = "no_decode"  # prefill alone: no decode worker can take the request
    SHORT_ANSWER = "short_answer"  # prefill alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt, as a policy sees it."""

    num_tokens: int
    num_cacheable_tokens: int = 1 << 62  # leading tokens that need not be computed where they are cached
    hit_weight: float = 1.0  # saving of a cached token, in computed tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    worker_id: WorkerId
    page_size: int  # tokens
    num_requests: int  # running or waiting there, without waiting ones that the request passes (fairness.py)
    num_pending_tokens: int  # prompt tokens sent there by this gateway and not known to be computed
    num_known_pages: int  # cached there, by the index
    held: HeldPages = NOTHING_HELD  # the leading pages of the prompt that the worker has cached
    num_coming_tokens: int = 0  # the leading tokens of the prompt that the worker computes for other requests
    served_session: bool = False  # it served the last request of the same session
    role: Role = Role.UNIFIED
    page_bytes: int = 0
    num_available_pages: int = 1 << 62  # in its device pool: free, or cached and perhaps not in use
    max_running_requests: int = 1
    service_s: float = 0.0  # recent mean time of a request from its first admission to its end
    rates: Rates = field(default_factory=Rates)

    @property
    def num_held_tokens(self) -> int:
        return self.held.num_pages * self.page_size

    @property
    def num_hit_tokens(self) -> int:
        """Leading tokens that need not be computed for the prompt: cached, or under way for another request."""
        return max(self.num_held_tokens, self.num_coming_tokens // self.page_size * self.page_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """The workers of one request, by their views. One worker alone has both parts."""

    prefill: WorkerView
    decode: WorkerView
    reason: Reason
    cost_ms: float | None = None  # by the policy's own measure, if it has one

    @staticmethod
    def alone(worker: WorkerView, reason: Reason) -> Path:
        return Path(prefill=worker, decode=worker, reason=reason)

    @property
    def is_alone(self) -> bool:
        return self.prefill.worker_id == self.decode.worker_id

    @property
    def worker_ids(self) -> tuple[WorkerId, WorkerId]:
        return self.prefill.worker_id, self.decode.worker_id

    def because(self, reason: Reason, *, cost_ms: float) -> Path:
        return replace(self, reason=reason, cost_ms=cost_ms)


def _any_pair(_prefill: WorkerId, _decode: WorkerId) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """The workers that can serve a request now. There is a worker in `alone` or `also_alone`, or a pair."""

    alone: Sequence[WorkerView]  # unified workers; for a request of one token also prefill workers
    prefill: Sequence[WorkerView]  # each may be paired with a worker of `decode`, and the other way round
    decode: Sequence[WorkerView]
    also_alone: Sequence[WorkerView] = ()  # workers of pairs that can serve the whole request without a handoff
    may_pair: Callable[[WorkerId, WorkerId], bool] = _any_pair  # whether pages can travel from one to the other

    @staticmethod
    def of_workers(workers: Sequence[WorkerView]) -> FleetView:
        """Return a fleet without pairs: one of these workers is chosen."""
        return FleetView(alone=workers, prefill=(), decode=())


class Policy(Protocol):
    def choose(self, prompt: Prompt, fleet: FleetView) -> Path: ...


class WorkerPolicy(Protocol):
    """Chooses one worker at a time; policies/by_worker.py makes a `Policy` of it."""

    def choose(self, prompt: Prompt, candidates: Sequence[WorkerView]) -> WorkerId:
        """Return the id of one candidate. `candidates` is not empty."""
