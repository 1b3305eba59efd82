"""The steps that are planned and not reported yet. A step may write the pages of its requests until its report."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from kvist.scheduler.active import ActiveRequest


@dataclass(slots=True, kw_only=True)
class PendingStep:
    """The requests whose K/V a planned step computes, until the step is reported. Mutable while it is planned."""

    decodes: list[ActiveRequest]  # each computes one token, perhaps sampled by the step before, and samples one
    chunks: list[tuple[ActiveRequest, int, bool]]  # request, end position of its chunk, whether it samples a token
    planned_s: float = 0.0
    num_prompt_tokens: int = 0  # of all chunks
    is_full: bool = False  # has no room for another token

    def requests(self) -> list[ActiveRequest]:
        return [*self.decodes, *(request for request, *_ in self.chunks)]


class PendingSteps:
    """Steps in the order of their plans: at most one, with overlap two. Mutable; its one owner is the scheduler."""

    def __init__(self, *, overlap: bool) -> None:
        self._most = 2 if overlap else 1
        self._steps: deque[PendingStep] = deque()
        self._last_reported_id = 0

    @property
    def is_full(self) -> bool:
        return len(self._steps) == self._most

    @property
    def next_id(self) -> int:
        """The id of the step that is planned next."""
        return self._last_reported_id + len(self._steps) + 1

    def push(self, step: PendingStep) -> None:
        self._steps.append(step)

    def pop(self, step_id: int) -> PendingStep:
        """Remove and return the oldest step, which has been reported as finished or failed."""
        assert self._steps, "no step is pending"
        assert step_id == self._last_reported_id + 1, "steps are reported once, in order"
        self._last_reported_id = step_id
        return self._steps.popleft()

    def writes(self, request: ActiveRequest) -> bool:
        """Return whether a pending step writes the pages of the request."""
        return request.last_step_id > self._last_reported_id
