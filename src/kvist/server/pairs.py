"""How each pair of a prefill and a decode worker hands pages over, for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, product

from kvist.plan.compat import meet
from kvist.request import Role
from kvist.router.stream import WorkerSnapshot

MAX_PAIRS = 64


def pair_infos(workers: Sequence[WorkerSnapshot]) -> list[dict[str, object]]:
    """Return the transport of each pair of ready workers, or why there is none; the first `MAX_PAIRS` pairs."""
    specs = {
        role: [worker.spec for worker in workers if worker.alive and worker.role is role and worker.spec is not None]
        for role in (Role.PREFILL, Role.DECODE)
    }
    found: list[dict[str, object]] = []
    for prefill, decode in islice(product(specs[Role.PREFILL], specs[Role.DECODE]), MAX_PAIRS):
        choice = meet(prefill, decode)
        names = {"prefill": prefill.worker_id, "decode": decode.worker_id}
        found.append({**names, "transport": choice.name, "reason": choice.reason})
    return found
