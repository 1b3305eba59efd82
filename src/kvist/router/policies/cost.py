"""PURE. The policy `cost`: the route with the lowest cost in milliseconds (docs/routing.md has the formulas).

The cost of a worker for prefill is the time until it has computed the prompt: the prompt tokens queued there, host
pages to load, and tokens that it has in no tier, each at the worker's measured rate. Computed tokens take that time
from the worker's other requests too, so it is added. The cost of a worker for decode grows with its requests. A pair
adds the bytes that travel between its workers.

A request takes one worker instead of a pair where that is cheaper: decode holds nearly the whole prompt, or the queue
of every prefill worker takes longer than the work, or the answer is so short that prefill generates it.
"""

from __future__ import annotations

from kvist.request import Role
from kvist.router.policy import FleetView, Path, Prompt, Reason, WorkerView

_MS = 1000.0


class Cost:
    """Has no state of its own."""

    def choose(self, prompt: Prompt, fleet: FleetView) -> Path:
        paths = [Path.alone(worker, Reason.UNIFIED) for worker in [*fleet.alone, *fleet.also_alone]]
        costs = [(alone_ms(prompt, path.prefill), path) for path in paths]
        costs += _pair_costs(prompt, fleet)
        best_ms, best = min(costs, key=_order)
        return best.because(_reason(prompt, fleet, best), cost_ms=best_ms)


def prefill_ms(prompt: Prompt, worker: WorkerView) -> float:
    """Return the time until the worker has computed the prompt."""
    rates = worker.rates
    return _MS * worker.num_pending_tokens / rates.prompt_tokens_per_s + _load_ms(worker) + _compute_ms(
        prompt, worker
    )  # fmt: skip


def stall_ms(prompt: Prompt, worker: WorkerView) -> float:
    """Return the time that the prompt takes from the worker's other requests: from the next ones in the queue, and from
    the streams. Without it a prefix would be computed on every idle worker, since waiting for it takes as long."""
    return _compute_ms(prompt, worker) * (1 + worker.num_requests / max(1, worker.max_running_requests))


def decode_ms(prompt: Prompt, worker: WorkerView) -> float:
    """Return the cost of the worker's requests for one more stream, and of pages that must be freed for it."""
    load_ms = _MS * worker.service_s * worker.num_requests / max(1, worker.max_running_requests)
    num_short = prompt.num_tokens - worker.num_available_pages * worker.page_size
    return load_ms + _MS * max(0, num_short) / worker.rates.prompt_tokens_per_s


def handoff_ms(prompt: Prompt, target: WorkerView) -> float:
    """Return the time to hand over the pages that the decode worker lacks."""
    num_pages = -(-(prompt.num_tokens - target.num_held_tokens) // target.page_size)
    return _MS * max(0, num_pages) * target.page_bytes / target.rates.handoff_bytes_per_s


def alone_ms(prompt: Prompt, worker: WorkerView) -> float:
    return prefill_ms(prompt, worker) + stall_ms(prompt, worker) + decode_ms(prompt, worker)


def _compute_ms(prompt: Prompt, worker: WorkerView) -> float:
    return _MS * num_missing_tokens(prompt, worker) / worker.rates.prompt_tokens_per_s


def _load_ms(worker: WorkerView) -> float:
    return _MS * worker.held.num_host * worker.page_bytes / worker.rates.host_bytes_per_s


def num_missing_tokens(prompt: Prompt, worker: WorkerView) -> int:
    """Return how many prompt tokens the worker must compute: one at least."""
    return max(1, prompt.num_tokens - min(worker.num_hit_tokens, prompt.num_cacheable_tokens))


def _pair_costs(prompt: Prompt, fleet: FleetView) -> list[tuple[float, Path]]:
    """Return the cheapest pair of each decode worker."""
    first = sorted(
        ((prefill_ms(prompt, each) + stall_ms(prompt, each), each) for each in fleet.prefill),
        key=lambda cost: (cost[0], cost[1].num_requests, cost[1].worker_id),
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
    return cost_ms, path.decode.num_requests, path.prefill.num_known_pages, path.worker_ids


def _reason(prompt: Prompt, fleet: FleetView, best: Path) -> Reason:
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
    return Reason.PREFILL_QUEUE
