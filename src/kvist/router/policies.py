"""PURE choice of a worker for a request: one door, `Policy.choose`, three policies.

A policy sees `WorkerView`s of workers that may take the request now; it never sees lost or full ones. The same views
in the same order of calls give the same choices. Round robin is the only one with a memory: whom it chose last.
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
    digests: Mapping[str, Sequence[bytes]]  # by a worker's namespace: one for each full page, first to last


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    worker_id: WorkerId
    namespace: str
    page_size: int  # tokens
    num_requests: int  # running or waiting there
    num_pending_tokens: int  # prompt tokens sent there and not computed yet, as far as we know
    cached_pages: AbstractSet[bytes]  # digests


class Policy(Protocol):
    def choose(self, prompt: PromptDigests, candidates: Sequence[WorkerView]) -> WorkerId:
        """One of the candidates, of which there is at least one."""


def num_hit_tokens(prompt: PromptDigests, worker: WorkerView) -> int:
    """Tokens of the longest leading run of pages that the worker has cached."""
    num_pages = 0
    for digest in prompt.digests.get(worker.namespace, ()):
        if digest not in worker.cached_pages:
            break
        num_pages += 1
    return num_pages * worker.page_size


class RoundRobin:
    """Workers in the order of their names, each in turn, however the set of candidates changes."""

    def __init__(self) -> None:
        self._last: WorkerId | None = None

    def choose(self, prompt: PromptDigests, candidates: Sequence[WorkerView]) -> WorkerId:  # noqa: ARG002 (any prompt, in turn)
        names = sorted(worker.worker_id for worker in candidates)
        self._last = next((name for name in names if self._last is None or name > self._last), names[0])
        return self._last


class LeastLoaded:
    """Fewest requests, then fewest prompt tokens still to compute."""

    def choose(self, prompt: PromptDigests, candidates: Sequence[WorkerView]) -> WorkerId:  # noqa: ARG002 (only load counts)
        return min(candidates, key=lambda w: (w.num_requests, w.num_pending_tokens, w.worker_id)).worker_id


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAware:
    """The worker where the prompt's tokens are soonest ready: those not cached there, and those before them in line.

    When loads are far apart the least loaded is chosen, whatever it has cached: a popular prefix must not pile all its
    users on one worker.
    """

    cache_threshold: float  # share of the prompt; shorter hits do not count
    balance_abs_threshold: int  # requests
    balance_rel_threshold: float
    hit_weight: float = 1.0  # what a cached token saves, in computed tokens
    request_penalty_tokens: int = 64  # what one more request there costs, in computed tokens

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
    """Who reads the prompt."""
    return _build(config, hit_weight=1.0)


def decode_policy(config: RouterConfig) -> Policy:
    """Who writes the answer. A page that decode has need not be moved, which costs far less than computing it: load
    weighs more here."""
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
