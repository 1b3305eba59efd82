"""PURE. Makes a policy of a `WorkerPolicy`, which knows no paths: first the worker for prefill, then the one for
decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvist.request import Role
from kvist.router.policy import FleetView, Path, Prompt, Reason, WorkerPolicy, WorkerView

# A cached page saves a decode worker a transfer, which costs far less than computing the page: load weighs more.
DECODE_HIT_WEIGHT = 0.25


class ByWorker:
    """Uses one `WorkerPolicy` for the first worker, and another of the same kind for decode. A worker of a pair serves
    whole requests only while there is neither a pair nor a unified worker. Mutable if the policies are."""

    def __init__(self, make: Callable[[], WorkerPolicy]) -> None:
        self._first, self._second = make(), make()

    def choose(self, prompt: Prompt, fleet: FleetView) -> Path:
        pairs = {worker.worker_id for worker in fleet.prefill}
        first = [*fleet.alone, *(each for each in fleet.prefill if each not in fleet.alone)]
        if not first:
            worker = _pick(self._first, prompt, fleet.also_alone)
            return Path.alone(worker, Reason.NO_PREFILL if worker.role is Role.DECODE else Reason.SHORT_ANSWER)
        worker = _pick(self._first, prompt, first)
        if worker in fleet.alone or worker.worker_id not in pairs:
            return Path.alone(worker, Reason.UNIFIED if worker.role is Role.UNIFIED else Reason.SHORT_ANSWER)
        partners = [each for each in fleet.decode if fleet.may_pair(worker.worker_id, each.worker_id)]
        partner = _pick(self._second, replace(prompt, hit_weight=DECODE_HIT_WEIGHT), partners)
        return Path(prefill=worker, decode=partner, reason=Reason.SPLIT)


def _pick(policy: WorkerPolicy, prompt: Prompt, candidates: Sequence[WorkerView]) -> WorkerView:
    worker_id = policy.choose(prompt, candidates)
    return next(worker for worker in candidates if worker.worker_id == worker_id)
