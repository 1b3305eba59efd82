"""PURE. The policy `least_loaded`."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.request import WorkerId
from kvist.router.policy import Prompt, WorkerView


class LeastLoaded:
    """Chooses the worker with the fewest requests, then with the fewest pending prompt tokens."""

    def choose(self, prompt: Prompt, candidates: Sequence[WorkerView]) -> WorkerId:  # noqa: ARG002 (only load counts)
        return min(candidates, key=lambda w: (w.num_requests, w.num_pending_tokens, w.worker_id)).worker_id
