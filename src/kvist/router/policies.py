"""PURE choice of a worker for a request: one interface, `Policy.choose`, and three policies.

A policy gets `WorkerView`s of the workers that can serve the request now, never of lost or full ones. Equal views in an
equal order of calls give equal choices. Round robin is the only policy with state: the last worker it chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

from kvist.request import WorkerId
from kvist.router.config import RouterConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptDigests:
    num_tokens: int
    digests: Mapping[str, Sequence[bytes]]  # by namespace of a worker: one per full page, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    worker_id: WorkerId
    namespace: str
    page_size: int  # tokens
    num_requests: int  # running or waiting there
    num_pending_tokens: int  # prompt tokens sent there by this gateway and not known to be computed
    cached_pages: AbstractSet[bytes]  # digests


class Policy(Protocol):
    def choose(self, prompt: PromptDigests, candidates: Sequence[WorkerView]) -> WorkerId:
        """Return the id of one candidate. `candidates` is not empty."""


def num_hit_tokens(prompt: PromptDigests, worker: WorkerView) -> int:
    """Return the number of tokens in the longest leading run of pages that the worker has cached."""
    num_pages = 0
    for digest in prompt.digests.get(worker.namespace, ()):
        if digest not in worker.cached_pages:
            break
        num_pages += 1
    return num_pages * worker.page_size


class RoundRobin:
    """Chooses the workers in turn, in the order of their names, also while the set of candidates changes."""

    def __init__(self) -> None:
        self._last: WorkerId | None = None

    def choose(self, prompt: PromptDigests, candidates: Sequence[WorkerView]) -> WorkerId:  # noqa: ARG002 (any prompt, in turn)
        names = sorted(worker.worker_id for worker in candidates)
        self._last = next((name for name in names if self._last is None or name > self._last), names[0])
        return self._last


class LeastLoaded:
    """Chooses the worker with the fewest requests, then with the fewest pending prompt tokens."""

    def choose(self, prompt: PromptDigests, candidates: Sequence[WorkerView]) -> WorkerId:  # noqa: ARG002 (only load counts)
        return min(candidates, key=lambda w: (w.num_requests, w.num_pending_tokens, w.worker_id)).worker_id


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAware:
    """Chooses the worker with the fewest tokens to compute before the first token: uncached ones plus queued ones.

    If loads differ too much, the least loaded worker is chosen regardless of its cache: a popular prefix must not send
    all its requests to one worker.
    """

    cache_threshold: float  # fraction of the prompt; shorter hits are ignored
    balance_abs_threshold: int  # requests
    balance_rel_threshold: float
    hit_weight: float = 1.0  # saving of a cached token, in computed tokens
    request_penalty_tokens: int = 64  # cost of each request at the worker, in computed tokens

    def choose(self, prompt: PromptDigests, candidates: Sequence[WorkerView]) -> WorkerId:
        loads = [worker.num_requests for worker in candidates]
        lowest, highest = min(loads), max(loads)
        if highest - lowest > self.balance_abs_threshold and highest > self.balance_rel_threshold * lowest:
            return LeastLoaded().choose(prompt, candidates)
        return min(candidates, key=lambda w: (self._cost(prompt, w), w.num_requests, len(w.cached_pages), w.worker_id)
        ).worker_id  # fmt: skip

    def _cost(self, prompt: PromptDigests, worker: WorkerView) -> float:
        num_hit = num_hit_tokens(prompt, worker)
        if num_hit < self.cache_threshold * prompt.num_tokens:
            num_hit = 0
        queued = worker.num_pending_tokens + self.request_penalty_tokens * worker.num_requests
        return prompt.num_tokens - self.hit_weight * num_hit + queued


def prompt_policy(config: RouterConfig) -> Policy:
    """Build the policy that chooses the worker for prefill, or the unified worker."""
    return _build(config, hit_weight=1.0)


def decode_policy(config: RouterConfig) -> Policy:
    """Build the policy that chooses the worker for decode.

    A cached page saves a transfer there, which costs far less than computing the page: load weighs more."""
    return _build(config, hit_weight=0.25)


def _build(config: RouterConfig, *, hit_weight: float) -> Policy:
    if config.policy == "round_robin":
        return RoundRobin()
    if config.policy == "least_loaded":
        return LeastLoaded()
    assert config.policy == "cache_aware", config.policy
    return CacheAware(
        cache_threshold=config.cache_threshold,
        balance_abs_threshold=config.balance_abs_threshold,
        balance_rel_threshold=config.balance_rel_threshold,
        hit_weight=hit_weight,
    )
