"""One HTTP request under way, and how its record is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvist.flight.records import CachedTokens, RequestRecord, Status
from kvist.flight.stages import SENT
from kvist.flight.timeline import Timeline
from kvist.flight.trace_context import TraceContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The answers of a request so far."""

    prompt_tokens: int
    cached_tokens: CachedTokens
    completion_tokens: int
    first_token_s: float | None  # on the gateway's clock
    finish_reason: str | None  # of the first answer
    is_complete: bool  # every answer has a finish reason
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request as it arrived."""

    request_id: str
    response_id: str
    endpoint: str
    model: str
    received_s: float  # on the gateway's clock
    received_unix_s: float
    trace: TraceContext | None = None
    wants_trace: bool = False  # its response shows its record


class Flight:
    """Mutable; owned by the task of the request."""

    def __init__(
        self, arrival: Arrival, clock: Callable[[], float], progress: Callable[[], Progress], num_answers: int
    ) -> None:
        self.arrival = arrival
        self.trace_id = None if arrival.trace is None else arrival.trace.trace_id
        self.error_code: str | None = None
        self.has_ended = False
        self._clock = clock
        self._progress = progress
        self._num_answers = num_answers
        self._timeline = Timeline(arrival.received_s)
        self._forks: list[Timeline] = []

    def reached(self, stage: str, at_s: float | None = None) -> None:
        """Count the time since the newest token, or the stage before, up to `at_s` or now, to this stage: of the answer
        that is last by now."""
        timeline = self._newest()
        timeline.on_last_token()
        timeline.advance(stage, self._clock() if at_s is None else at_s)

    def ends(self) -> None:
        """Count the rest of the time: the response is sent, or the client has left before its end."""
        if self.error_code is not None or self._progress().is_complete:
            self.reached(SENT)
        else:
            self._newest().ends_early(self._clock())

    def open_answer(self) -> Timeline:
        """Return the timeline of the next answer, from here on."""
        if self._num_answers == 1:
            return self._timeline
        self._forks.append(self._timeline.fork())
        return self._forks[-1]

    def record(self) -> RequestRecord:
        """Return the record up to now."""
        arrival, progress, timeline = self.arrival, self._progress(), self._newest()
        if not self.has_ended:
            timeline = timeline.so_far(self._clock(), has_all_tokens=progress.is_complete)
        first_s = progress.first_token_s
        return RequestRecord(
            id=arrival.request_id,
            response_id=arrival.response_id,
            trace_id=self.trace_id,
            endpoint=arrival.endpoint,
            model=arrival.model,
            received_unix_s=arrival.received_unix_s,
            duration_s=round(timeline.end_s - arrival.received_s, 6),
            ttft_s=None if first_s is None else round(first_s - arrival.received_s, 6),
            status=self._status(progress),
            error=self.error_code,
            finish_reason=progress.finish_reason,
            prompt_tokens=progress.prompt_tokens,
            cached_tokens=progress.cached_tokens,
            completion_tokens=progress.completion_tokens,
            answers=self._num_answers,
            workers=progress.workers,
            stages=timeline.stages(),
        )

    def _newest(self) -> Timeline:
        return max(self._forks, key=lambda each: each.latest_s, default=self._timeline)

    def _status(self, progress: Progress) -> Status:
        if progress.is_complete and self.error_code is None:
            return Status.FINISHED
        if not self.has_ended:
            return Status.RUNNING
        return Status.ABORTED if self.error_code is None else Status.FAILED
