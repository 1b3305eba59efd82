"""PURE. The policy `cache_aware`, and its options, which have SGLang's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvist.config import option
from kvist.request import WorkerId
from kvist.router.policies.least_loaded import LeastLoaded
from kvist.router.policy import Prompt, WorkerView

REQUEST_PENALTY_TOKENS = 64  # cost of each request at the worker, in computed tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAwareOptions:
    cache_threshold: float = option(
        0.1, "a cached prefix shorter than this fraction of the prompt is ignored", minimum=0.0, maximum=1.0
    )
    balance_abs_threshold: int = option(
        32,
        "the least loaded worker is chosen if the highest load exceeds the lowest by more requests than this, and also "
        "by more than the factor --balance-rel-threshold",
        unit="requests",
        minimum=0,
    )
    balance_rel_threshold: float = option(
        1.5,
        "the least loaded worker is chosen if the highest load is more than this many times the lowest, and also "
        "exceeds it by more than --balance-abs-threshold",
        minimum=1.0,
    )


class CacheAware:
    """Chooses the worker with the fewest tokens to compute before the first token: uncached ones plus queued ones.

    If loads differ too much, the least loaded worker is chosen regardless of its cache: a popular prefix must not send
    all its requests to one worker.
    """

    def __init__(self, options: CacheAwareOptions) -> None:
        self._options = options
        self._by_load = LeastLoaded()

    def choose(self, prompt: Prompt, candidates: Sequence[WorkerView]) -> WorkerId:
        options = self._options
        loads = [worker.num_requests for worker in candidates]
        lowest, highest = min(loads), max(loads)
        if highest - lowest > options.balance_abs_threshold and highest > options.balance_rel_threshold * lowest:
            return self._by_load.choose(prompt, candidates)
        return min(candidates, key=lambda w: (self._cost(prompt, w), w.num_requests, w.num_known_pages, w.worker_id)
        ).worker_id  # fmt: skip

    def _cost(self, prompt: Prompt, worker: WorkerView) -> float:
        num_hit = worker.num_hit_tokens
        if num_hit < self._options.cache_threshold * prompt.num_tokens:
            num_hit = 0
        queued = worker.num_pending_tokens + REQUEST_PENALTY_TOKENS * worker.num_requests
        return prompt.num_tokens - prompt.hit_weight * num_hit + queued
