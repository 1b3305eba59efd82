"""PURE. The policy `cache_aware`, and its options, which have SGLang's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvist.config import option
from kvist.request import WorkerId
from kvist.router.policy import Prompt, WorkerView

REQUEST_PENALTY_TOKENS = 64  # cost of each request at the worker, in computed tokens
SESSION_BONUS_TOKENS = 32  # of the worker that served the session last: less than one request


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAwareOptions:
    cache_threshold: float = option(
        0.1, "a cached prefix shorter than this fraction of the prompt is ignored", minimum=0.0, maximum=1.0
    )
    balance_abs_threshold: int = option(
        32,
        "a worker gets no request while its load exceeds the lowest by more requests than this, and also by more than "
        "the factor --balance-rel-threshold",
        unit="requests",
        minimum=0,
    )
    balance_rel_threshold: float = option(
        1.5,
        "a worker gets no request while its load is more than this many times the lowest, and also exceeds it by more "
        "than --balance-abs-threshold",
        minimum=1.0,
    )


class CacheAware:
    """Chooses the worker with the fewest tokens to compute before the first token: uncached ones plus queued ones.

    Workers with a far higher load than the least loaded one are left out: a popular prefix must not send all its
    requests to one worker. Among the others the cache counts as always.
    """

    def __init__(self, options: CacheAwareOptions) -> None:
        self._options = options

    def choose(self, prompt: Prompt, candidates: Sequence[WorkerView]) -> WorkerId:
        options = self._options
        lowest = min(worker.num_requests for worker in candidates)
        most = max(lowest + options.balance_abs_threshold, options.balance_rel_threshold * lowest)
        return min(
            (worker for worker in candidates if worker.num_requests <= most),
            key=lambda w: (self._cost(prompt, w), w.num_requests, w.num_known_pages, w.worker_id),
        ).worker_id

    def _cost(self, prompt: Prompt, worker: WorkerView) -> float:
        num_hit = worker.num_hit_tokens
        if num_hit < self._options.cache_threshold * prompt.num_tokens:
            num_hit = 0
        queued = worker.num_pending_tokens + REQUEST_PENALTY_TOKENS * worker.num_requests
        bonus = SESSION_BONUS_TOKENS if worker.served_session else 0
        return prompt.num_tokens - prompt.hit_weight * num_hit + queued - bonus
