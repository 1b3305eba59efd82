"""PURE. The policy `cost`: the route with the lowest cost in milliseconds (docs/routing.md has the formulas).

The cost of a worker for prefill is the time until it has computed the prompt: the prompt tokens queued there, pages to
load from its host tier and its store, and tokens that it has in no tier, each at the worker's measured rate. Computed
tokens take that time from the worker's other requests too, so it is added. The cost of a worker for decode grows with
its requests, and with the measured time of its decode steps. A pair adds the bytes that travel between its workers.

A request takes one worker instead of a pair where that is cheaper: decode holds nearly the whole prompt, or prefill has
a queue, or the handoff costs more than it saves, or the answer is so short that prefill generates it.
"""

from __future__ import annotations

import math

from kvist.request import Role
from kvist.router.policy import FleetView, Path, Prompt, Reason, WorkerView

# The time that a computed token takes from other requests, in its own time: from those that wait behind it, and from
# those that compute evicted pages again. docs/routing.md has the measurement.
OTHERS = 3.0
_MS = 1000.0
_SESSION_FACTOR = 0.95  # on the cost of the worker that served the session last: 5% more load, and another is chosen


class Cost:
    """Has no state of its own."""

    def __init__(self, others: float = OTHERS) -> None:
        self._others = others

    def choose(self, prompt: Prompt, fleet: FleetView) -> Path:
        paths = [Path.alone(worker, Reason.UNIFIED) for worker in [*fleet.alone, *fleet.also_alone]]
        costs = [(alone_ms(prompt, path.prefill, self._others), path) for path in paths]
        pairs = _pair_costs(prompt, fleet, self._others)
        best_ms, best = min([*costs, *pairs], key=_order)
        no_queue_ms = min((cost_ms - queue_ms(path.prefill) for cost_ms, path in pairs), default=math.inf)
        return best.because(_reason(prompt, fleet, best, waits=no_queue_ms < best_ms), cost_ms=best_ms)


def queue_ms(worker: WorkerView) -> float:
    """Return the time of the prompts that wait at the worker."""
    return _MS * worker.num_pending_tokens / worker.rates.prompt_tokens_per_s


def prefill_ms(prompt: Prompt, worker: WorkerView) -> float:
    """Return the time until the worker has computed the prompt."""
    return queue_ms(worker) + _load_ms(worker) + _compute_ms(prompt, worker)


def stall_ms(prompt: Prompt, worker: WorkerView, others: float) -> float:
    """Return the time that the prompt takes from the worker's other requests: `others` times its own from those that
    come after it, and up to once from the streams. Without it a prefix would be computed on every idle worker, since
    waiting for it takes as long."""
    return _compute_ms(prompt, worker) * (others + worker.num_requests / max(1, worker.max_running_requests))


def decode_ms(prompt: Prompt, worker: WorkerView) -> float:
    """Return the cost of the worker's requests for one more stream, and of pages that must be freed for it."""
    answer_s = worker.service_s if worker.rates.decode_s is None else worker.rates.decode_s
    load_ms = _MS * answer_s * worker.num_requests / max(1, worker.max_running_requests)
    num_short = prompt.num_tokens - worker.num_available_pages * worker.page_size
    return load_ms + _MS * max(0, num_short) / worker.rates.prompt_tokens_per_s


def handoff_ms(prompt: Prompt, target: WorkerView) -> float:
    """Return the time to hand over the pages that the decode worker lacks."""
    num_pages = -(-(prompt.num_tokens - target.num_held_tokens) // target.page_size)
    return _MS * max(0, num_pages) * target.page_bytes / target.rates.handoff_bytes_per_s


def alone_ms(prompt: Prompt, worker: WorkerView, others: float = OTHERS) -> float:
    return prefill_ms(prompt, worker) + stall_ms(prompt, worker, others) + decode_ms(prompt, worker)


def _compute_ms(prompt: Prompt, worker: WorkerView) -> float:
    return _MS * num_missing_tokens(prompt, worker) / worker.rates.prompt_tokens_per_s


def _load_ms(worker: WorkerView) -> float:
    """Return the time to bring pages into the device pool, each from the nearest tier that has it."""
    held, rates = worker.held, worker.rates
    num_coming = max(0, worker.num_hit_tokens - worker.num_held_tokens) // worker.page_size  # computed there anyway
    seconds = held.num_host / rates.host_bytes_per_s + max(0, held.num_stored - num_coming) / rates.store_bytes_per_s
    return _MS * seconds * worker.page_bytes


def num_missing_tokens(prompt: Prompt, worker: WorkerView) -> int:
    """Return how many prompt tokens the worker must compute: one at least."""
    num_stored = (worker.held.num_pages + worker.held.num_stored) * worker.page_size
    return max(1, prompt.num_tokens - min(max(worker.num_hit_tokens, num_stored), prompt.num_cacheable_tokens))


def _pair_costs(prompt: Prompt, fleet: FleetView, others: float) -> list[tuple[float, Path]]:
    """Return the cheapest pair of each decode worker."""
    first = sorted(
        ((prefill_ms(prompt, each) + stall_ms(prompt, each, others), each) for each in fleet.prefill),
        key=lambda cost: (_preferred(cost[0], cost[1]), cost[1].num_requests, cost[1].worker_id),
    )
    found = []
    for target in fleet.decode:
        source = next((cost for cost in first if fleet.may_pair(cost[1].worker_id, target.worker_id)), None)
        if source is not None:
            cost_ms = source[0] + handoff_ms(prompt, target) + decode_ms(prompt, target)
            found.append((cost_ms, Path(prefill=source[1], decode=target, reason=Reason.SPLIT)))
    return found


def _order(costed: tuple[float, Path]) -> tuple[float, int, int, tuple[str, str]]:
    cost_ms, path = costed
    cost_ms = _preferred(cost_ms, path.prefill, path.decode)
    return cost_ms, path.decode.num_requests, path.prefill.num_known_pages, path.worker_ids


def _preferred(cost_ms: float, *workers: WorkerView) -> float:
    return cost_ms * _SESSION_FACTOR if any(worker.served_session for worker in workers) else cost_ms


def _reason(prompt: Prompt, fleet: FleetView, best: Path, *, waits: bool) -> Reason:
    """Return why `best` was chosen. `waits`: without its queue, a prefill worker of a pair would have been cheaper."""
    worker = best.prefill
    if not best.is_alone:
        return Reason.SPLIT
    if worker.role is Role.UNIFIED:
        return Reason.UNIFIED
    if worker.role is Role.PREFILL:
        return Reason.SHORT_ANSWER
    if not fleet.prefill:
        return Reason.NO_PREFILL
    if _compute_ms(prompt, worker) <= handoff_ms(prompt, worker) or num_missing_tokens(prompt, worker) <= (
        worker.page_size
    ):
        return Reason.HELD
    return Reason.PREFILL_QUEUE if waits else Reason.CHEAPER
