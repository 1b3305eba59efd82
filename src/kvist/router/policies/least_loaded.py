"""PURE. The policy `least_loaded`."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.request import WorkerId
from kvist.router.policy import Prompt, WorkerView


class LeastLoaded:
    """Chooses the worker with the fewest requests; among those the one that served the session last, then one with the
    fewest pending prompt tokens."""

    def choose(self, prompt: Prompt, candidates: Sequence[WorkerView]) -> WorkerId:  # noqa: ARG002 (only load counts)
        return min(candidates, key=_load).worker_id


def _load(worker: WorkerView) -> tuple[int, bool, int, WorkerId]:
    return worker.num_requests, not worker.served_session, worker.num_pending_tokens, worker.worker_id
