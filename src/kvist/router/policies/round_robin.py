"""PURE. The policy `round_robin`. Mutable: remembers the last worker that it chose."""

from __future__ import annotations

from collections.abc import Sequence

from kvist.request import WorkerId
from kvist.router.policy import Prompt, WorkerView


class RoundRobin:
    """Chooses the workers in turn, in the order of their names, also while the set of candidates changes."""

    def __init__(self) -> None:
        self._last: WorkerId | None = None

    def choose(self, prompt: Prompt, candidates: Sequence[WorkerView]) -> WorkerId:  # noqa: ARG002 (any prompt, in turn)
        names = sorted(worker.worker_id for worker in candidates)
        self._last = next((name for name in names if self._last is None or name > self._last), names[0])
        return self._last
